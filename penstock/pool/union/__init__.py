"""Several nodes, and a local pool, as one."""
