"""The cluster: prefill and decode engines, the router, membership, and the paths of KV between them."""
