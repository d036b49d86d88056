"""A service with the interface of an OpenAI-compatible server that routes every request step by step."""
