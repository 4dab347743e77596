"""Tiny labelled images in each form that a recipe can name."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from image_cases import folders, idx_folder, tensors  # noqa: F401 (fixtures)
