"""The live driver: executors that carry out the decisions of the scheduler core, with real memory and models."""
