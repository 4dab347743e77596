"""What we add to lm-evaluation-harness's own command line: the model `moh`, and the suites as groups of tasks.

    moh lm-eval run --model moh --model_args pretrained=DIR --tasks paper14 --log_samples

Dense and MoH models also run as `--model hf`. What `moh` adds is in `HarnessModel`: a request longer than the model's
positions is an error, scores are computed in float32, and .gguf files can be read.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from accelerate import PartialState
from lm_eval.api.registry import register_model

from moh.evaluation.harness.registry import SUITE_FILES
from moh.evaluation.harness.runner import HarnessModel, head_share
from moh.models.transformers.loading import load_causal_lm, load_tokenizer


@register_model("moh")
class CommandModel(HarnessModel):
    """The model `moh` of the harness's command line; arguments are those of `--model_args`, and options of their own.

    Args:
        pretrained: directory, hub name or .gguf file; dense or MoH.
        dtype: of the weights; "auto" keeps the checkpoint's.
        max_length: most tokens of a request (default: the model's positions).
        batch_size: requests per forward pass, or "auto" on a GPU.
        device: such as "cuda:1" (default: the accelerator if there is one).

    Raises:
        ValueError: a dtype is unknown, or the model can't be loaded or does not match its tokenizer.
    """

    def __init__(
        self,
        pretrained: str,
        *,
        dtype: str = "auto",
        max_length: int | None = None,
        batch_size: int | str = 1,
        device: str | None = None,
        max_batch_size: int | None = None,
    ) -> None:
        from moh.evaluation.harness.evaluate import DTYPES

        if dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
        state = PartialState(cpu=device == "cpu" or not torch.accelerator.is_available())
        where = state.device if device is None or state.num_processes > 1 else torch.device(device)
        model = load_causal_lm(
            pretrained, dtype=dtype if dtype == "auto" else getattr(torch, dtype), device=torch.device(where)
        )
        super().__init__(model, load_tokenizer(pretrained), state, batch_size=batch_size, max_length=max_length)
        if max_batch_size is not None:
            self.max_batch_size = max_batch_size

    def get_model_info(self) -> dict[str, Any]:
        """The harness's, with the share of the heads that a token uses, which `read_logged` shows."""
        return {**super().get_model_info(), "share_of_heads": head_share(self.model.config)}


def with_suites(arguments: Sequence[str]) -> list[str]:
    """The arguments of `lm-eval`, with the suites' groups found by name in a run without `--include_path` of its own."""
    arguments = list(arguments)
    runs = bool(arguments) and (arguments[0] == "run" or arguments[0].startswith("--"))
    given = any(argument.partition("=")[0] in ("--include_path", "--help", "-h") for argument in arguments)
    return [*arguments, "--include_path", str(SUITE_FILES)] if runs and not given else arguments
