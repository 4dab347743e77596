"""Data: texts, tokens, pixels and random numbers. Below the models: nothing here knows a network."""
