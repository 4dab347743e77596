"""Runs causal language models on tasks: lm-evaluation-harness's `HFLM` around a loaded model of ours.

It adds: a request longer than the model's positions is an error, or counted, where the harness cuts it silently; scores
in float32; accelerate's processes share the requests.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import logging
import random
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import lm_eval
import numpy as np
import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import broadcast_object_list, gather_object
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import normalize_gen_kwargs
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from moh.data.text.blocks import start_tokens
from moh.evaluation.harness.registry import HarnessTask, LoadedTask, TaskRegistry
from moh.evaluation.harness.results import ModelScores, ScoreStore, model_identity
from moh.evaluation.harness.scores import TaskScore, read_score
from moh.models.transformers.families import supported_positions
from moh.models.transformers.loading import load_causal_lm, load_config, load_tokenizer
from moh.training.language.model import check_fits


class HarnessModel(HFLM):  # type: ignore[misc] # the harness has no types
    """The model that `lm_eval.evaluate` takes.

    Args:
        model: on its device.
        tokenizer: its own.
        state: the processes that share the work.
        batch_size: requests per forward pass, or "auto".
        max_length: most tokens of a request; None allows the model's positions.
        truncate: cut off the beginning of a context that is too long, and count it; otherwise it is an error.
        progress: show progress bars (only on a terminal).

    Every request begins as the tokenizer begins a text (`start_tokens`), also where its beginning was cut off.

    Attributes:
        truncated: requests of this process that were cut.

    Raises:
        ValueError: model and tokenizer don't match, or `max_length` is above the model's positions.
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
        check_fits(model.config, tokenizer, {})
        positions = supported_positions(model.config)
        if max_length is not None and positions is not None and max_length > positions:
            raise ValueError(f"max_length must be at most the model's {positions} positions, got {max_length}")
        self._start = start_tokens(tokenizer)
        super().__init__(
            pretrained=model,
            tokenizer=tokenizer,
            backend="causal",
            add_bos_token=True if self._start else None,  # some versions of the harness decide by the model's name
            batch_size=batch_size,
            max_length=max_length,
            softmax_dtype="float32",
        )
        if state.num_processes > 1:  # given a loaded model, HFLM leaves this to its caller
            self.accelerator = Accelerator(cpu=state.device.type == "cpu")
            self._rank, self._world_size = state.process_index, state.num_processes
        self.truncate = truncate
        self.truncated = 0
        self._silent = not (progress and sys.stderr.isatty())

    def _loglikelihood_tokens(
        self, requests: Sequence[Any], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> Any:
        checked = []
        for pair, context, continuation in requests:
            if pair is None:  # a window of a text whose perplexity is measured
                checked.append((pair, *self._begun(context, continuation)))
                continue
            if not continuation:  # the harness has only a bare assertion
                text, answer = pair
                raise ValueError(
                    f"the answer {answer!r} has no token of its own after {text[-40:]!r}: does it need a space?"
                )
            # the last token is predicted, not read
            if self._is_cut(len(context) + len(continuation) - 1, uncut=len(continuation)):
                kept = self.max_length + 1 - len(continuation) - len(self._start)
                context = [*self._start, *context[len(context) - kept :]]
            checked.append((pair, context, continuation))
        return super()._loglikelihood_tokens(checked, disable_tqdm or self._silent, override_bs)

    def _begun(self, context: list[int], continuation: list[int]) -> tuple[list[int], list[int]]:
        """A window with the beginning of a text, once: the first one has it twice, the others lack it."""
        start = self._start
        if context[: len(start)] == start:
            again = bool(start) and continuation[: len(start)] == start and len(continuation) > len(start)
            return context, continuation[len(start) :] if again else continuation
        room = self.max_length + 1 - len(continuation) - len(start)  # the last token is predicted, not read
        return [*start, *context[len(context) - min(room, len(context)) :]], continuation

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> Any:
        for request in requests:
            context, options = request.args
            new = normalize_gen_kwargs(options, self.max_gen_toks)["max_gen_toks"]
            self._is_cut(len(self.tok_encode(context)) + new, uncut=new + 1)
        return super().generate_until(requests, disable_tqdm or self._silent)

    def tok_batch_encode(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """The harness's, with the beginning of a text before a context whose own was cut off."""
        ids, mask = super().tok_batch_encode(*args, **kwargs)
        if self._start and kwargs.get("left_truncate_len"):
            ids[mask[:, 0] == 1, : len(self._start)] = torch.tensor(self._start)  # padding is on the left
        return ids, mask

    def _is_cut(self, tokens: int, *, uncut: int) -> bool:
        """Whether a request of `tokens` tokens, `uncut` of which can't be cut off, is too long; counted then.

        Raises:
            ValueError: it is, and may not be cut.
        """
        if tokens <= self.max_length:
            return False
        if not self.truncate or uncut > self.max_length:
            raise ValueError(
                f"a request has {tokens} tokens, {uncut} of them its answer, but the model takes {self.max_length}: "
                "use fewer shots, or truncate to cut off the beginning of its context"
            )
        self.truncated += 1
        return True


_BOOTSTRAP = 1000
"""Resamples for the few scores whose standard error has no formula; the harness's own number takes minutes."""


@dataclass(frozen=True)
class LoadedModel:
    """A model in memory with its tokenizer. It has no files to identify it by, so its scores are never cached."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase


@dataclass(frozen=True)
class Options:
    """The checked options of `evaluate_tasks`."""

    limit: int | None
    batch_size: int | str
    dtype: str
    device: torch.device
    device_map: Any
    revisions: Mapping[str, str]
    seed: int
    max_length: int | None
    truncate: bool
    apply_chat_template: bool
    progress: bool

    def settings(self) -> dict[str, Any]:
        """What scores depend on besides model and task."""
        names = ("dtype", "seed", "max_length", "truncate", "apply_chat_template")
        return {"lm-eval": version("lm-eval"), **{name: getattr(self, name) for name in names}}


class Runner:
    """Loads a model only if one of its scores isn't cached, and the data of a task only if a model needs it."""

    def __init__(self, registry: TaskRegistry, options: Options, state: PartialState, store: ScoreStore) -> None:
        self.registry, self.options, self.state, self.store = registry, options, state, store
        self._tasks: dict[str, LoadedTask] = {}

    def scores(self, label: str, source: str | Path | LoadedModel) -> ModelScores:
        """All scores of one model."""
        revision = self.options.revisions.get(label)
        identities = self._identities(source, revision)
        found = {name: self.store.read(label, name, identity) for name, identity in identities.items()}
        # the processes must agree on the tasks left, even if they don't see the same files
        (found,) = broadcast_object_list([found])
        left = [task for task in self.registry.tasks if found.get(task.name) is None]
        if not left and not isinstance(source, LoadedModel):
            share, shown = head_share(load_config(source, revision=revision)), str(source)
        else:
            self._load_tasks(left)
            model = self._model(label, source, revision)
            share, shown = head_share(model.config), str(source) if isinstance(source, (str, Path)) else "in memory"
            for task in left:
                score = self._ask(model, label, self._tasks[task.name])
                found[task.name] = score
                if self.state.is_main_process and identities:
                    self.store.write(label, score, identities[task.name])
        scores = tuple(score for task in self.registry.tasks if (score := found[task.name]) is not None)
        return ModelScores(label, shown, share, scores)

    def _identities(self, source: str | Path | LoadedModel, revision: str | None) -> dict[str, dict[str, Any]]:
        """What each task's score of this model depends on; empty for a model that can't be identified."""
        if isinstance(source, LoadedModel):
            return {}
        common = {"model": model_identity(source, revision), "limit": self.options.limit, **self.options.settings()}
        return {
            task.name: {**common, "task": self.registry.identity(task), "spec": list(dataclasses.astuple(task))}
            for task in self.registry.tasks
        }

    def _load_tasks(self, tasks: Sequence[HarnessTask]) -> None:
        """Load the data of all tasks before the first question, so that missing data is reported at once."""
        new = [task for task in tasks if task.name not in self._tasks]
        with self.state.main_process_first(), _quiet(self.options.progress):
            loaded = self.registry.load(new)
        self._tasks |= {task.spec.name: task for task in loaded}

    def _model(self, label: str, source: str | Path | LoadedModel, revision: str | None) -> HarnessModel:
        options = self.options
        try:
            if isinstance(source, LoadedModel):
                model, tokenizer = source.model, source.tokenizer
            else:
                tokenizer = load_tokenizer(source, revision=revision)
                dtype = options.dtype if options.dtype == "auto" else getattr(torch, options.dtype)
                place: dict[str, Any] = {"device": options.device}
                if options.device_map is not None:
                    place = {"device_map": options.device_map}
                model = load_causal_lm(source, dtype=dtype, revision=revision, **place)
            if options.apply_chat_template and not tokenizer.chat_template:
                raise ValueError("apply_chat_template needs a chat template, and the model's tokenizer has none")
            with _quiet(self.options.progress):
                return HarnessModel(
                    model,
                    tokenizer,
                    self.state,
                    batch_size=options.batch_size,
                    max_length=options.max_length,
                    truncate=options.truncate,
                    progress=options.progress,
                )
        except (ValueError, OSError) as error:
            raise ValueError(f"model {label!r}: {error}") from None

    def _ask(self, model: HarnessModel, label: str, task: LoadedTask) -> TaskScore:
        options = self.options
        if options.progress:
            print(f"{label}: {task.spec.title}", file=sys.stderr)
        model.truncated = 0
        try:
            with _quiet(self.options.progress):
                _seed(options.seed)
                for part in task.parts:  # otherwise each model would see other solved examples than the last
                    part.set_fewshot_seed(seed=options.seed)
                # not `simple_evaluate`: it lists all packages of this machine for every task
                results = lm_eval.evaluate(
                    model,
                    self.registry.manager.load([task.item]),
                    limit=options.limit,
                    bootstrap_iters=_BOOTSTRAP,
                    apply_chat_template=options.apply_chat_template,
                    fewshot_as_multiturn=options.apply_chat_template,
                )
        except ValueError as error:
            raise ValueError(f"model {label!r}, task {task.spec.name!r}: {error}") from None
        truncated = sum(gather_object([model.truncated]))
        score = None if results is None else read_score(results, task.spec, task.weighs_by_size, truncated)
        shared: list[TaskScore | None] = broadcast_object_list([score])
        (score,) = shared
        assert score is not None
        return score


def head_share(config: Any) -> float:
    """Share of the heads that a token uses, by a threshold what the calibration's tokens used on average; 1 if dense."""
    return float(getattr(config, "share", 1.0))


def _seed(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


@contextlib.contextmanager
def _quiet(progress: bool) -> Iterator[None]:
    """Silence the harness's remarks on what we do on purpose (a loaded model, other shots), but not its errors.

    It prints some to standard output, which is for results; and progress bars, which are for terminals.
    """
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    screen = sys.stderr if progress and sys.stderr.isatty() else io.StringIO()
    try:
        with contextlib.redirect_stdout(screen), contextlib.redirect_stderr(screen):
            yield
    finally:
        logger.setLevel(level)
