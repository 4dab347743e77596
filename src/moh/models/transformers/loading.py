"""Load causal language models and tokenizers from a directory, a hub name or a .gguf file, as our commands do.

A thin layer over transformers' Auto classes (extra `hf`). Code that comes with a model is never run; the published
MoH-LLaMA3-8B is loaded with ours.
"""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from moh._files import shard_files
from moh.models.hub import keep_revision
from moh.models.kinds import looks_local
from moh.models.transformers.families import family_of, is_text_encoder
from moh.models.transformers.published import recognised

_DAMAGE = (SafetensorError, UnpicklingError, StrictDataclassError, KeyError, TypeError, OSError)


def default_device() -> torch.device:
    """The accelerator if there is one, else the CPU."""
    found = torch.accelerator.current_accelerator(check_available=True)
    return found if found is not None else torch.device("cpu")


def load_causal_lm(
    path: str | Path, *, dtype: torch.dtype | str = "auto", device: torch.device | None = None, **kwargs: Any
) -> PreTrainedModel:
    """Load a causal language model, dense or MoH.

    Args:
        path: local directory, name on the Hugging Face hub, or a .gguf file (dequantised, needs the `gguf` package).
        dtype: of the weights; "auto" keeps the checkpoint's.
        device: where the model goes; None leaves it where transformers loads it, on the CPU unless `kwargs` say otherwise.
        kwargs: for `AutoModelForCausalLM.from_pretrained`.

    Raises:
        ValueError: `path` looks like a local path but nothing is there, or its configuration or weights are damaged.

    Warns where the model's `generation_config` can't be saved and was mended.
    """
    return load_as(AutoModelForCausalLM, path, dtype=dtype, device=device, **kwargs)


def load_text_model(path: str | Path, **kwargs: Any) -> PreTrainedModel:
    """Load a causal language model, or an encoder of text as the class that it was saved as; arguments as `load_causal_lm`."""
    if Path(path).suffix == ".gguf" or not is_text_encoder(
        config := load_config(path, revision=kwargs.get("revision"))
    ):
        return load_causal_lm(path, **kwargs)
    family = family_of(config.model_type)
    assert family is not None
    auto = family.auto_class([name.removeprefix("MoH") for name in config.architectures or ()])
    return load_as(getattr(transformers, auto), path, **kwargs)


def load_as(
    kind: Any, path: str | Path, *, dtype: torch.dtype | str = "auto", device: torch.device | None = None, **kwargs: Any
) -> PreTrainedModel:
    """Load a model by an Auto class or a class of its own; all else as in `load_causal_lm`."""
    source, gguf = _source(path)
    for name in ("model.safetensors.index.json", "pytorch_model.bin.index.json"):
        index = Path(source) / name
        if index.is_file():
            shard_files(index)  # all next to it
    try:
        if not gguf:
            config = AutoConfig.from_pretrained(source, trust_remote_code=False, revision=kwargs.get("revision"))
            if (published := recognised(config, source)) is not config:
                kwargs = {"config": published, **kwargs}
        model: PreTrainedModel = kind.from_pretrained(
            source, dtype=dtype, use_safetensors=not _has_only_pytorch_files(Path(source)), weights_only=True,
            trust_remote_code=False, **gguf, **kwargs,
        )  # fmt: skip
    except ValueError as error:
        if "Unrecognized configuration class" not in str(error):  # followed by hundreds that are
            raise
        what = load_config(path, revision=kwargs.get("revision")).model_type
        raise ValueError(f"model {str(path)!r} is of type {what!r}, which {kind.__name__} can't load") from None
    except _DAMAGE as error:
        raise _damaged(error, path, "a configuration or weights") from None
    if gguf:
        # The tensors are dequantised: from here on it is a plain model, which may be saved.
        model.hf_quantizer = None
        model.is_quantized = False
        del model.config.quantization_config
    mend_generation_config(model)
    keep_revision(model, kwargs.get("revision"))
    return model if device is None else model.to(device)


def _has_only_pytorch_files(directory: Path) -> bool:
    """Whether a directory's weights are `pytorch_model*.bin`, which are read with `weights_only=True`."""
    return any(directory.glob("pytorch_model*.bin")) and not any(directory.glob("*.safetensors"))


def mend_generation_config(model: Any) -> None:
    """Reset, with a warning, what transformers refuses to save in a model's `generation_config`, in place.

    Many published models set `temperature` without `do_sample`; transformers loads that, ignores it and refuses to save it,
    which would stop a run at its first checkpoint.
    """
    config, reset = getattr(model, "generation_config", None), {}
    while config is not None and (problem := _unsavable(config)) is not None:
        default = type(config)()
        named = {name for name in re.findall(r"`(\w+)`", problem) if hasattr(default, name)}
        wrong = {name for name in named if getattr(config, name) != getattr(default, name)}
        wrong = (
            wrong - {"do_sample", "num_beams"} or wrong
        )  # what they allow or forbid goes, and generation stays the same
        if not wrong:
            raise ValueError(f"the model's generation_config can't be saved: {problem}")
        for name in sorted(wrong):
            reset[name] = getattr(config, name)
            setattr(config, name, getattr(default, name))
    if reset:
        said = ", ".join(f"{name} = {value!r}" for name, value in reset.items())
        warnings.warn(f"generation_config: transformers refuses to save {said}: removed from the model", stacklevel=3)


def _unsavable(config: GenerationConfig) -> str | None:
    """Why transformers refuses to save the configuration, in one line, or None."""
    try:
        config.validate(strict=True)
    except ValueError as error:
        return " ".join(str(error).split())
    return None


def load_config(path: str | Path, *, revision: str | None = None) -> PreTrainedConfig:
    """Load the configuration of a model alone; `path` as in `load_causal_lm`, `revision` of a hub name."""
    source, gguf = _source(path)
    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=False, revision=revision, **gguf)
        return recognised(config, source)
    except _DAMAGE as error:
        raise _damaged(error, path, "a configuration") from None


def _damaged(error: Exception, path: str | Path, what: str) -> Exception:
    """The error to raise for one of `_DAMAGE`; what the hub or the network reports stays as it is."""
    if isinstance(error, OSError) and not Path(path).expanduser().exists():
        return error
    return ValueError(f"model {str(path)!r} has {what} that can't be read: {' '.join(str(error).split())}")


def load_tokenizer(path: str | Path, *, revision: str | None = None) -> PreTrainedTokenizerBase:
    """Load the tokenizer that belongs to a model; `path` as in `load_causal_lm`, `revision` of a hub name."""
    source, gguf = _source(path)
    return AutoTokenizer.from_pretrained(source, trust_remote_code=False, revision=revision, **gguf)


def _source(path: str | Path) -> tuple[str, dict[str, str]]:
    """What `from_pretrained` takes for `path`."""
    local = Path(path).expanduser()
    if local.suffix == ".gguf":
        if not local.is_file():
            raise ValueError(f"model must be an existing .gguf file, got {str(path)!r}")
        return str(local.parent), {"gguf_file": local.name}
    if looks_local(path) and not local.is_dir():
        raise ValueError(f"model must be a directory, a .gguf file or a hub name, but there is no {str(path)!r}")
    return str(local) if local.is_dir() else str(path), {}
