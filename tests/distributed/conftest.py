"""A complete recipe for the teams of processes."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture
def options(base_dir: Path, text_file: Path, tmp_path: Path) -> list[str]:
    """A converted model with a balance loss, trained for four steps of twelve samples in `tmp_path / "out"`."""
    return [
        f"--model.path={base_dir}",
        f"--data.files=['{text_file}']",
        "--data.seq_len=16",
        "--conversion={shared_heads: 1, active_heads: 2, router: query_norm}",
        "--training.tokens_per_batch=192",
        "--training.max_steps=4",
        "--training.learning_rate=0.01",
        "--training.lr_scheduler_type=constant",
        "--training.warmup_steps=0",
        "--training.balance_loss_coef=0.5",
        "--training.balance_loss_scope=global",
        "--training.precision=fp32",
        "--training.extra={disable_tqdm: true, report_to: []}",
        f"--training.output_dir={tmp_path / 'out'}",
    ]
