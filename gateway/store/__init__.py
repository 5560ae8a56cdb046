"""The store: what must outlive the supervisor, in SQLite or PostgreSQL."""
