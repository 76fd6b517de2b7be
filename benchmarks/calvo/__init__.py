"""CALVO: loading and computing as stages of their own, ordered by both; live and simulated."""
