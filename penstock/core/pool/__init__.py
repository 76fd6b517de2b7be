"""Decisions of the pool: where a block goes, what stays, whose turn it is, who may write."""
