"""The endpoint of a cluster: engines that registered, requests that are placed, their answers."""
