"""Penstock inside vLLM beside other stores of KV."""
