"""Moving blocks between hosts."""
