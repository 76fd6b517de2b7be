"""The simulated driver: virtual clock, fluid links, modelled devices; it drives the core and holds no policy."""
