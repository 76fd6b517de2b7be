"""Penstock: LLM serving for requests whose time goes into loading KV cache rather than computing it."""

__version__ = "0.1.0"
