"""The endpoint of a cluster: registered engines, placed requests and their answers."""
