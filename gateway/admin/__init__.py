"""The admin port: the API under /admin/v1, the management calls, and the dashboard."""
