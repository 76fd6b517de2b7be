"""The simulated body: virtual clock, fluid links, modelled devices; it drives the brain and holds no policy."""
