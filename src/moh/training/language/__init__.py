"""Training of causal language models (extra `train`)."""
