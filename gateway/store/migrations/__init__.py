"""How the database came to its present form, one file a step; run by `gateway.store.engine`."""
