"""A causal language model as lm-evaluation-harness asks it: its `HFLM` around a model of ours that is loaded already.

What it adds: a request that is longer than the model's positions is an error, or counted, where the harness cuts it
without a word; scores in float32; and the processes of accelerate share the requests. Not for loading models.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from accelerate import Accelerator, PartialState
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import normalize_gen_kwargs
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from moh.training.loading import check_fits


class HarnessModel(HFLM):  # type: ignore[misc] # the harness has no types
    """What `lm_eval.evaluate` takes as its model.

    Args:
        model: on its device.
        tokenizer: its own.
        state: the processes that share the work.
        batch_size: requests per forward pass, or "auto".
        max_length: tokens that a request may have; None allows the model's positions.
        truncate: cut the beginning off a context that is too long, and count it, instead of refusing it.
        progress: show progress bars (only on a terminal).

    Attributes:
        truncated: requests of this process that were cut.

    Raises:
        ValueError: model and tokenizer don't fit each other, or `max_length` is above the model's positions.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        state: PartialState,
        *,
        batch_size: int | str = 1,
        max_length: int | None = None,
        truncate: bool = False,
        progress: bool = True,
    ) -> None:
        check_fits(model.config, tokenizer, 1)
        positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        if max_length is not None and positions is not None and max_length > positions:
            raise ValueError(f"max_length must be at most the model's {positions} positions, got {max_length}")
        super().__init__(
            pretrained=model,
            tokenizer=tokenizer,
            backend="causal",
            batch_size=batch_size,
            max_length=max_length,
            softmax_dtype="float32",
        )
        if state.num_processes > 1:  # HFLM leaves this to its caller when it is given a model
            self.accelerator = Accelerator(cpu=state.device.type == "cpu")
            self._rank, self._world_size = state.process_index, state.num_processes
        self.truncate = truncate
        self.truncated = 0
        self._silent = not (progress and sys.stderr.isatty())

    def _loglikelihood_tokens(
        self, requests: Sequence[Any], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> Any:
        for (text, answer), context, continuation in requests:
            if not continuation:  # the harness stops at a bare assertion
                raise ValueError(
                    f"no token is left of the answer {answer!r} after {text[-40:]!r}: does it need a space?"
                )
            # the last token is predicted, not read
            self._check_length(len(context) + len(continuation) - 1, uncut=len(continuation))
        return super()._loglikelihood_tokens(requests, disable_tqdm or self._silent, override_bs)

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> Any:
        for request in requests:
            context, options = request.args
            new = normalize_gen_kwargs(options, self.max_gen_toks)["max_gen_toks"]
            self._check_length(len(self.tok_encode(context)) + new, uncut=new + 1)
        return super().generate_until(requests, disable_tqdm or self._silent)

    def _check_length(self, tokens: int, *, uncut: int) -> None:
        """Check a request of so many tokens, of which `uncut` can't be cut off."""
        if tokens <= self.max_length:
            return
        if not self.truncate or uncut > self.max_length:
            raise ValueError(
                f"a request has {tokens} tokens, {uncut} of them its answer, but the model takes {self.max_length}: "
                "fewer shots make it shorter, and truncate allows to cut the beginning off its context"
            )
        self.truncated += 1
