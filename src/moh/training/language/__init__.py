"""Training of causal language models (extra `llm`)."""
