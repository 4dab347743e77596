"""What all training runs here need: tiny models as objects, and a complete recipe as options."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch


@pytest.fixture
def dense(base_dir: Path):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(base_dir, dtype=torch.float32)


@pytest.fixture
def options(base_dir: Path, text_file: Path, tmp_path: Path) -> list[str]:
    """Command-line overrides that make a complete recipe: a dense run of six steps in `tmp_path / "out"`."""
    return [
        f"--model.path={base_dir}",
        f"--data.files=['{text_file}']",
        "--data.seq_len=16",
        f"--training.output_dir={tmp_path / 'out'}",
        "--training.max_steps=6",
        "--training.learning_rate=0.01",
        "--training.per_device_train_batch_size=2",
        "--training.precision=fp32",
        "--training.extra={'disable_tqdm': true}",
    ]


@pytest.fixture
def moh_model(dense):
    """The tiny Llama with one shared head and, per layer, one or two of the three others, chosen by query norm."""
    from moh import convert

    return convert(dense, shared_heads=1, active_heads=[1, 2], router="query_norm")
