"""The pool over the network: wire, node, client, connections, one-sided reads."""
