"""A disk that fills up while a checkpoint is written costs only that checkpoint."""

from __future__ import annotations

import errno
import traceback
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from torch.distributed.checkpoint.api import CheckpointException

from moh.training import load_recipe, train
from moh.training.checkpoints import last_complete_checkpoint, writing_checkpoint

# As torch 2.14 and safetensors 0.8 raise them on a full file system
ERRORS = {
    "plain_file": OSError(errno.ENOSPC, "No space left on device"),
    "safetensors": SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    "sharded": CheckpointException(
        "write",
        {0: (OSError(errno.ENOSPC, "No space left on device"), traceback.StackSummary.from_list([]))},
    ),
    "torch": RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 704 vs 598"),
}


@pytest.mark.parametrize("error", ERRORS.values(), ids=ERRORS.keys())
def test_the_last_good_checkpoint_survives_and_the_run_goes_on_from_it(
    options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    options += ["--training.save_steps=2"]
    save = torch.save

    def fails_at_step_four(data, file, *args, **kwargs):
        if "checkpoint-4" in str(file):
            Path(file).write_bytes(b"half")
            raise error
        save(data, file, *args, **kwargs)

    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", fails_at_step_four)
        with pytest.raises(
            RuntimeError, match=r"checkpoint-4 can't be written .*checkpoint-2 is complete: a restart resumes"
        ):
            train(load_recipe(None, options))
    assert last_complete_checkpoint(out) == out / "checkpoint-2"
    assert not (out / "checkpoint-4").exists()  # a half checkpoint would fill the remaining space

    resumed = train(load_recipe(None, options))
    assert resumed.resumed_from == out / "checkpoint-2"
    assert [step for step, _ in resumed.losses] == [1, 2, 3, 4, 5, 6]


def test_an_error_of_another_kind_is_not_taken_for_a_full_disk(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"^out of memory$"), writing_checkpoint(tmp_path / "checkpoint-1"):
        raise RuntimeError("out of memory")


def test_a_checkpoint_that_was_finished_is_kept_if_only_clearing_up_fails(options: list[str], tmp_path: Path) -> None:
    train(load_recipe(None, [*options, "--training.save_steps=3"]))
    checkpoint = tmp_path / "out" / "checkpoint-6"
    with pytest.raises(OSError, match="Permission denied"), writing_checkpoint(checkpoint):
        raise OSError(errno.EACCES, "Permission denied")
    assert last_complete_checkpoint(tmp_path / "out") == checkpoint
