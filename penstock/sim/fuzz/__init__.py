"""Randomised faults against the scheduler core, their rules, and the smallest case that fails."""
