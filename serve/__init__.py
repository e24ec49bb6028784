"""The OpenAI-compatible server, and the page that it shows."""
