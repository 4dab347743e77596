"""Speed of language models (prefill, decoding, training step), and the name of the processor it was measured on."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from moh._modes import evaluating

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def cpu_name() -> str:
    """The processor's name, such as "AMD EPYC 9B45"; with family, model and stepping if a virtual machine hides it."""
    fields = _cpuinfo()
    name = fields.get("model name") or platform.processor() or platform.machine()
    if fields.get("vendor_id") and not any(character.isdigit() for character in name):
        numbers = ", ".join(f"{key} {fields[key]}" for key in ("cpu family", "model", "stepping") if key in fields)
        name = f"{name} ({numbers})"
    return " ".join(name.split())


def device_name(device: torch.device) -> str:
    """Name of the device on which a model runs."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()


def _cpuinfo() -> dict[str, str]:
    """The first processor's entries in /proc/cpuinfo (Linux)."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return {}
    pairs = (line.partition(":") for line in text.split("\n\n")[0].splitlines())
    return {key.strip(): value.strip() for key, _, value in pairs}


@dataclass(frozen=True)
class Rate:
    """Tokens per second over some repeats.

    Attributes:
        median: over the repeats.
        low: lower quartile.
        high: upper quartile.
        values: one per repeat, in the order measured.
    """

    median: float
    low: float
    high: float
    values: tuple[float, ...]


@dataclass(frozen=True)
class ModelSpeed:
    """One model's speed.

    Attributes:
        prefill: prompt tokens per second.
        decode: new tokens per second, one at a time with the cache.
        train: tokens per second of a training step's forward and backward pass; None if not measured.
    """

    prefill: Rate
    decode: Rate
    train: Rate | None = None


@dataclass(frozen=True)
class SpeedReport:
    """Speeds measured in one process, and the conditions.

    Attributes:
        models: name -> speed.
        device: the processor's name.
        threads: torch's CPU threads.
        torch_version: as `torch.__version__`.
        dtype: of the first model's weights.
        batch_size, prompt_tokens, decode_tokens, repeats: as requested.
    """

    models: dict[str, ModelSpeed]
    device: str
    threads: int
    torch_version: str
    dtype: str
    batch_size: int
    prompt_tokens: int
    decode_tokens: int
    repeats: int


def measure_speed(
    models: Mapping[str, PreTrainedModel],
    *,
    prompt: Tensor | None = None,
    prompt_tokens: int = 512,
    decode_tokens: int = 32,
    batch_size: int = 1,
    repeats: int = 5,
    training: bool = False,
    before: Callable[[str], object] | None = None,
    progress: bool = True,
) -> SpeedReport:
    """Time each model's prefill of a prompt and decoding after it, in turns, `repeats` times after one warm-up.

    Args:
        models: name -> model, on one device; run in evaluation mode, their own modes are restored.
        prompt: `[batch_size, prompt_tokens]` token ids; None draws random ones (unusual text for a router).
        prompt_tokens: length of a drawn prompt.
        decode_tokens: tokens decoded after the prompt, greedily.
        batch_size: sequences of a drawn prompt.
        repeats: timed rounds.
        training: also time the loss and its gradients on the prompt (a training step without the optimiser's).
        before: called with a model's name at the start of its turn, outside the measured time; it can set up one model
            under several names (`moh.evaluation.curve` sets its dial).
        progress: show a progress bar (only on a terminal).

    Raises:
        ValueError: there is no model, or a number is below 1.
    """
    from tqdm.auto import tqdm

    if not models:
        raise ValueError("models must name at least one model, got none")
    for name, value in {
        "prompt_tokens": prompt_tokens,
        "decode_tokens": decode_tokens,
        "batch_size": batch_size,
        "repeats": repeats,
    }.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    first = next(iter(models.values()))
    if prompt is None:
        generator = torch.Generator().manual_seed(0)
        prompt = torch.randint(first.config.vocab_size, (batch_size, prompt_tokens), generator=generator)
    prompt = prompt.to(first.device)
    rates: dict[str, tuple[list[float], list[float], list[float]]] = {name: ([], [], []) for name in models}
    names = list(models)
    with evaluating(*models.values()):
        for repeat in tqdm(
            range(-1, repeats), desc="speed", unit="round", disable=None if progress else True, leave=False
        ):
            turn = max(repeat, 0) % len(names)  # a different model goes first in each round
            for name in names[turn:] + names[:turn]:
                if before is not None:
                    before(name)
                prefill, decode = _time_once(models[name], prompt, decode_tokens)
                if repeat >= 0:
                    rates[name][0].append(prompt.numel() / prefill)
                    rates[name][1].append(prompt.shape[0] * decode_tokens / decode)
                if training:
                    seconds = _time_training(models[name], prompt)
                    if repeat >= 0:
                        rates[name][2].append(prompt.numel() / seconds)
    return SpeedReport(
        models={
            name: ModelSpeed(_rate(prefill), _rate(decode), _rate(train) if training else None)
            for name, (prefill, decode, train) in rates.items()
        },
        device=device_name(first.device),
        threads=torch.get_num_threads(),
        torch_version=torch.__version__,
        dtype=str(first.dtype).removeprefix("torch."),
        batch_size=prompt.shape[0],
        prompt_tokens=prompt.shape[1],
        decode_tokens=decode_tokens,
        repeats=repeats,
    )


def cache_of(outputs: Mapping[str, Any]) -> dict[str, Any]:
    """The cache in a model's outputs, as the argument of its next call; transformers 5.24 has renamed both to `cache`."""
    name = "cache" if "cache" in outputs else "past_key_values"
    return {name: outputs[name]}


@torch.no_grad()
def _time_once(model: PreTrainedModel, prompt: Tensor, decode_tokens: int) -> tuple[float, float]:
    """Seconds for the prompt, and for decoding after it."""
    clock = device_clock(prompt.device)
    start = clock()
    # As in `generate`: logits are computed for the last token only
    outputs = model(input_ids=prompt, use_cache=True, logits_to_keep=1)
    middle = clock()
    for _ in range(decode_tokens):
        token = outputs.logits[:, -1:].argmax(-1)  # [B, 1]
        outputs = model(input_ids=token, **cache_of(outputs), use_cache=True)
    return middle - start, clock() - middle


def _time_training(model: PreTrainedModel, prompt: Tensor) -> float:
    """Seconds for the loss of the prompt and its gradients, which are discarded."""
    clock = device_clock(prompt.device)
    kept = [(parameter, parameter.grad) for parameter in model.parameters()]
    start = clock()
    with torch.enable_grad():
        model(input_ids=prompt, labels=prompt, use_cache=False).loss.backward()
    seconds = clock() - start
    for parameter, grad in kept:
        parameter.grad = grad
    return seconds


def device_clock(device: torch.device) -> Callable[[], float]:
    """A clock that waits for the GPU's queue."""
    if device.type != "cuda":
        return time.perf_counter

    def read() -> float:
        torch.cuda.synchronize(device)
        return time.perf_counter()

    return read


def _rate(values: list[float]) -> Rate:
    low, high = (min(values), max(values))
    if len(values) > 1:
        low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return Rate(statistics.median(values), low, high, tuple(values))
