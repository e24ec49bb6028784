"""Serving: what other engines need to serve the same checkpoints."""
