"""Serving: the page of the coming server, and what other engines need to serve the same checkpoints."""
