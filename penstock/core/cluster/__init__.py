"""Decisions over many engines: who belongs, which serve a request, which side reads its KV, what follows a failure."""
