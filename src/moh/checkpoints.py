"""Published checkpoints, under the name that users know; the code is in `moh.models`."""

from moh.models.published import load_published, save_published
from moh.models.transformers.published import recognise_published_llama

__all__ = ["load_published", "recognise_published_llama", "save_published"]
