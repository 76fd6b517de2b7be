"""The pool (L3): many memories and SSDs as one store of KV blocks."""
