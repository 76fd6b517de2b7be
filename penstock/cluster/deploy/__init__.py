"""From cluster.toml to running processes: with a supervisor or on Ray; and network settings for a cluster."""
