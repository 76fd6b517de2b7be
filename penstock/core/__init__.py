"""The scheduler core: every decision, as plain state machines. No I/O, clock, threads or torch."""
