"""The simulated driver: virtual clock, fluid links, modelled devices. It drives the core and decides nothing itself."""
