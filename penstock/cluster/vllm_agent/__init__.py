"""A stock `vllm serve` as an engine of a cluster: the agent beside it that speaks with router, relays and connector."""
