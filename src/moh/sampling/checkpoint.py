"""Image models on disk: transformer, scheduler, VAE and class names, in the layout of diffusers' pipelines."""

from __future__ import annotations

import hashlib
import importlib
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL, ConfigMixin, ModelMixin, SchedulerMixin
from safetensors import SafetensorError
from torch import Tensor, nn

from moh._files import write_text
from moh.models.hub import local_diffusion
from moh.models.kinds import DIFFUSION_TRANSFORMERS, kind_of
from moh.sampling.schedulers import diffusion_scheduler, read_scheduler

_INDEX = "model_index.json"


@dataclass(frozen=True)
class ImageModel:
    """A class-conditional diffusion model and all that drawing images with it needs.

    Attributes:
        transformer: predicts noise (and variance); called as `transformer(x, timestep=t, class_labels=y).sample`.
        scheduler: describes the diffusion it was trained on.
        vae: between images and latents; None if the model works on pixels.
        class_names: one per class; may be empty.
    """

    transformer: ModelMixin
    scheduler: SchedulerMixin
    vae: AutoencoderKL | None = None
    class_names: tuple[str, ...] = ()

    @property
    def device(self) -> torch.device:
        device: torch.device = next(self.transformer.parameters()).device
        return device

    @property
    def num_classes(self) -> int:
        """Number of classes; also the id of "no class" in guidance."""
        config = self.transformer.config
        return int(config["num_classes"] if "num_classes" in config else config["num_embeds_ada_norm"])

    @property
    def sample_shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of what the transformer denoises."""
        config = self.transformer.config
        return (int(config["in_channels"]), int(config["sample_size"]), int(config["sample_size"]))

    @property
    def learns_variance(self) -> bool:
        """Whether the transformer predicts variances as well as the noise."""
        config = self.transformer.config
        return bool(config["out_channels"] == 2 * config["in_channels"])

    def decode(self, x: Tensor) -> Tensor:
        """Images, about -1..1, from denoised pixels or latents `[B, C, h, w]`."""
        if self.vae is None:
            return x
        shift = self.vae.config.shift_factor or 0.0
        images: Tensor = self.vae.decode(x.to(self.vae.dtype) / self.vae.config.scaling_factor + shift).sample
        return images

    def check_classes(self, classes: Sequence[int]) -> None:
        """Raise a ValueError that names the first class id out of range."""
        for label in classes:
            if not 0 <= label < self.num_classes:
                raise ValueError(f"class must be between 0 and {self.num_classes - 1}, got {label}")

    def class_ids(self, classes: Sequence[str]) -> list[int]:
        """Class ids from names or ids, as a user types them; a number that is a class's name is taken as the name.

        Raises:
            ValueError: a class is neither an id nor a name of the model.
        """
        known: dict[str, int] = {}
        for number, label in enumerate(self.class_names):
            for name in (label, *label.split(",")):  # ImageNet's labels are lists of synonyms
                known.setdefault(name.strip(), number)
        ids = []
        for name in classes:
            if name in known:
                ids.append(known[name])
            elif name.removeprefix("-").isdecimal():
                ids.append(int(name))
            else:
                some = ", ".join(self.class_names[:10]) + (", ..." if len(self.class_names) > 10 else "")
                names = f"or a name ({some})" if some else "(the model has no class names)"
                raise ValueError(f"class must be an id between 0 and {self.num_classes - 1} {names}, got {name!r}")
        self.check_classes(ids)
        return ids

    def to(self, *, device: torch.device | None = None, dtype: torch.dtype | None = None) -> ImageModel:
        """Move the model; `dtype` is for the transformer only: the sampler and the VAE stay in float32."""
        nn.Module.to(self.transformer, device=device, dtype=dtype)  # diffusers' own warns about layers we don't have
        if self.vae is not None:
            self.vae.to(device=device)
        return self

    def digest(self) -> str:
        """Identifies the model: a hash of its parts' weights and of the diffusion."""
        parts = [weights_digest(self.transformer), _config_text(self.scheduler)]
        parts += [] if self.vae is None else [weights_digest(self.vae)]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def load_image_model(path: str | Path, *, vae: str | Path | None = None, revision: str | None = None) -> ImageModel:
    """Load a model for sampling, in evaluation mode.

    Args:
        path: directory or hub name of a pipeline (`model_index.json`), as training and its checkpoints write it; or of a
            transformer alone, MoH or dense, assumed to be trained on 1,000 steps of linear betas.
        vae: directory of an `AutoencoderKL` to use instead of the pipeline's.
        revision: branch, tag or commit of a hub name.

    Raises:
        ValueError: there is no such model, it can't be read, or it works on latents and has no VAE.
    """
    root = local_diffusion(path, revision=revision)
    pipeline = (root / _INDEX).is_file()
    index = json.loads((root / _INDEX).read_text(encoding="utf-8")) if pipeline else {}
    transformer = _load_transformer(root / "transformer" if pipeline else root)
    own = root / "vae"
    autoencoder = load_vae(vae) if vae is not None else load_vae(own) if own.is_dir() else None
    channels = int(transformer.config["in_channels"])
    clip = None if autoencoder is None else False  # latents must not be clipped, whatever the file states
    scheduler = read_scheduler(root / "scheduler", clip=clip) if pipeline else diffusion_scheduler(clip=clip is None)
    # Only pixels are clipped: a model that clips nothing works on latents, even with 1 or 3 channels
    if autoencoder is None and (channels not in (1, 3) or not scheduler.config.clip_sample):
        raise ValueError(f"the model in {path} works on latents of {channels} channels: name the VAE that decodes them")
    if autoencoder is not None and channels != autoencoder.config.latent_channels:
        raise ValueError(
            f"vae must have the {channels} latent channels of the model, got {autoencoder.config.latent_channels}"
        )
    names = {int(key): str(value) for key, value in (index.get("id2label") or {}).items()}
    return ImageModel(transformer, scheduler, autoencoder, tuple(names[key] for key in sorted(names)))


def load_vae(path: str | Path) -> AutoencoderKL:
    """Load an `AutoencoderKL` in float32, in evaluation mode.

    Args:
        path: a local directory or a name on the model hub.

    Raises:
        ValueError: diffusers can't load it.
    """
    try:
        return AutoencoderKL.from_pretrained(path, torch_dtype=torch.float32).eval().requires_grad_(False)
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise ValueError(f"vae {str(path)!r} can't be loaded: {' '.join(str(error).split())}") from None


def save_image_model(model: ImageModel, target: Path, *, with_vae: bool = True) -> None:
    """Write a model as a pipeline's directory.

    diffusers' `DiTPipeline.from_pretrained` reads it if it holds a VAE; the transformer alone is read with
    `from_pretrained(target, subfolder="transformer")`.

    Args:
        model: the model.
        target: an existing directory.
        with_vae: False leaves the VAE out: sampling then needs it as an argument.
    """
    name = type(model.transformer).__name__
    model.transformer.save_pretrained(target / "transformer")
    model.scheduler.save_pretrained(target / "scheduler")
    vae = model.vae if with_vae else None
    if vae is not None:
        vae.save_pretrained(target / "vae")
    index = {
        "_class_name": "DiTPipeline",
        "_diffusers_version": importlib.import_module("diffusers").__version__,
        "id2label": {str(i): label for i, label in enumerate(model.class_names)} or None,
        "scheduler": ["diffusers", type(model.scheduler).__name__],
        "transformer": [DIFFUSION_TRANSFORMERS[name], name],
        "vae": ["diffusers", "AutoencoderKL"] if vae is not None else [None, None],
    }
    write_text(target / _INDEX, json.dumps(index, indent=2, ensure_ascii=False) + "\n")


def save_with_parts_of(transformer: ModelMixin, source: Path, target: Path) -> None:
    """Write a transformer as a pipeline with another pipeline's scheduler, VAE and class names, copied as they are.

    Args:
        transformer: one of `DIFFUSION_TRANSFORMERS`.
        source: the other pipeline's directory.
        target: an existing directory.
    """
    name = type(transformer).__name__
    index = json.loads((source / _INDEX).read_text(encoding="utf-8"))
    transformer.save_pretrained(target / "transformer")
    for part in ("scheduler", "vae"):
        files = [*(source / part).glob("*.json"), *(source / part).glob("*.safetensors")]
        for file in files:
            (target / part).mkdir(exist_ok=True)
            shutil.copyfile(file, target / part / file.name)
    if (source / "vae").is_dir() and not any(
        (source / "vae").glob("*.safetensors")
    ):  # pickled weights are not passed on
        load_vae(source / "vae").save_pretrained(target / "vae")
    index["transformer"] = [DIFFUSION_TRANSFORMERS[name], name]
    write_text(target / _INDEX, json.dumps(index, indent=2, ensure_ascii=False) + "\n")


def weights_digest(module: ModelMixin) -> str:
    """Identifies a module: a hash of its configuration and of its tensors' names, dtypes, shapes and bytes."""
    digest = hashlib.sha256(_config_text(module).encode())
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


def _config_text(part: ConfigMixin) -> str:
    """The configuration of a part, without diffusers' notes on its origin."""
    config = {key: value for key, value in part.config.items() if not key.startswith("_")}
    return json.dumps(config, sort_keys=True, default=str)


def _load_transformer(folder: Path) -> ModelMixin:
    name = kind_of(folder).name
    if name not in DIFFUSION_TRANSFORMERS:
        raise ValueError(f"checkpoint {folder} must hold one of {', '.join(DIFFUSION_TRANSFORMERS)}, got {name!r}")
    try:
        kind = getattr(importlib.import_module(DIFFUSION_TRANSFORMERS[name]), name)
        transformer = kind.from_pretrained(folder, torch_dtype=torch.float32)
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise ValueError(f"checkpoint {folder} can't be loaded: {' '.join(str(error).split())}") from None
    return transformer.eval().requires_grad_(False)
