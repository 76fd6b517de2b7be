"""Penstock inside vLLM compared with other KV stores."""
