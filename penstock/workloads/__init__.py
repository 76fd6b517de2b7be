"""Request streams and their evaluation: generators, traces, deadlines, replay, statistics, plots."""
