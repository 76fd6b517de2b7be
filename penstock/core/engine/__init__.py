"""Decisions of one engine that owns its pages and batches: order, admission, loads, batches, saves, hand-offs."""
