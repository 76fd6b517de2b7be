"""The live body: executors that carry out what the scheduler core decides, on real memory and models."""
