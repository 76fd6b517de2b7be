"""Decisions of the pool: placement, eviction, fairness between tenants, admission of writes."""
