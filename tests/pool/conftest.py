"""Fixtures of the pool's tests: `way` runs a test in messages and one-sided."""

from tests.pool.net.one_sided_rig import way as way
