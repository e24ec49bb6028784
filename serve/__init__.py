"""Serving: `pard-serve`, and what other engines need to serve the same checkpoints."""
