"""Labelled images: sources, augmentation, batches (extra `vision`)."""

from moh._extras import require

require("torchvision", extra="vision")
