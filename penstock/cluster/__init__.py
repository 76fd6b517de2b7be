"""The cluster: prefill and decode engines, the router, membership, and the paths that KV takes between them."""
