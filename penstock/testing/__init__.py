"""Public fakes for tests of Penstock and of its users: virtual clock, ideal links, tiny checkpoints."""
