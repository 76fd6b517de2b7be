"""The live body: executors that carry out what the brain decides, on real memory and models."""
