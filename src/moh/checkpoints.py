"""Published checkpoints, under the name that users know; the code is in `moh.models`."""

from moh.models.published import load_published

__all__ = ["load_published"]
