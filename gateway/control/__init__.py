"""The supervisor: what is served, by which processes, and what happens when one dies."""
