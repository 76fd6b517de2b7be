"""Several pool nodes, and a local pool, as one pool."""
