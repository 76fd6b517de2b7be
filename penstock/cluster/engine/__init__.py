"""An engine in a cluster: `penstock serve`, its registration with the router, `EngineHost`."""
