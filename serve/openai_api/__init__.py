"""OpenAI's API: chats, completions, responses and embeddings."""
