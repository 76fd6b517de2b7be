"""Random faults against the scheduler core: invariants, and shrinking of failing cases."""
