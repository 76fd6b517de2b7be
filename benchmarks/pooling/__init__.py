"""Unified pooling: many memories and SSDs read as one; live and simulated."""
