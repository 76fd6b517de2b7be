"""What every process needs: guarded threads, children, file limits, logs of what is lost."""
