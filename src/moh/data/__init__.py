"""Texts, tokens and pixels; knows no model."""
