"""Lets the tests import the helpers of this folder."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "conversion"))  # has a tiny model of every family
