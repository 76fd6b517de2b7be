"""Penstock inside vLLM: a KV connector and a scheduler class. Importing this package does not import vLLM."""
