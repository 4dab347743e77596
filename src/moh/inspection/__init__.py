"""Inspection: which head did what. Head load per layer as a table and as a picture (the picture: extra `llm`)."""

from moh.inspection.load import HeadLoad, head_load

__all__ = ["HeadLoad", "head_load"]
