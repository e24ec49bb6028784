"""Ollama's API: chats, prompts, models and embeddings."""
