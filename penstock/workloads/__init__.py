"""Request streams and what is said of them: generators, traces, deadlines, replay, statistics, plots."""
