"""Every kind of graph that the gateway serves (`graphs`), and of file that it must refuse (`hostile`)."""
