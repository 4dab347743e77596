"""The main job from end to end: convert a pretrained language model, tune it, and show what it costs and what it keeps."""

from moh.demo.pipeline import DemoSettings, run_demo

__all__ = ["DemoSettings", "run_demo"]
