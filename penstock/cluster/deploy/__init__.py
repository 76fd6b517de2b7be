"""cluster.toml to running processes: by a supervisor, on Ray, with the settings of the network."""
