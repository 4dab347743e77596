"""Labelled images: where they are, how they are augmented, batches of them (extra `vision`)."""

from moh._extras import require

require("torchvision", extra="vision")
