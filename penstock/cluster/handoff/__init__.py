"""Moves KV from prefill to decode engines: buffer, relay, links, both sides of a hand-off."""
