"""Parts of every process: guarded threads, child processes, file limits, logs of losses."""
