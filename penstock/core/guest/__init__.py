"""Decisions inside an engine of somebody else's, such as vLLM: it owns pages and batches, the brain loads and saves."""
