"""CALVO: loading and computing as separate stages, ordered by the cost of both; live and simulated."""
