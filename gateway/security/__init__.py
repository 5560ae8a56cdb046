"""Who may do what: API keys, roles, sessions, and what a browser is kept from."""
