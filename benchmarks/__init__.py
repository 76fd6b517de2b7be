"""Experiments of the papers and comparisons with peers, from the checkout: `python -m benchmarks`."""
