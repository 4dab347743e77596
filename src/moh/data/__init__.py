"""Data: the ground on which models stand. It knows texts, tokens, pixels and random numbers, and no network."""
