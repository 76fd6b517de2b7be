"""KV that moves from prefill to decode engines: buffer, relay, links, both ends of a hand-off."""
