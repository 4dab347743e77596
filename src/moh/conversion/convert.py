"""`moh.convert`: a pretrained dense model -> the same model with MoH attention, calibrated in closed form.

No gradient step is taken; see `moh.training` for that. Query-norm router: the paper's; the other fits: ours. What
differs between families of models is in one adapter each: `language`, `timm_vit`, `transformers_vit`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import AutoModel, AutoModelForImageClassification, PreTrainedModel, PreTrainedTokenizerBase

from moh.config import MoHConfig
from moh.conversion.calibrator import Calibrator
from moh.conversion.dense import DenseModel
from moh.conversion.language import DenseLanguageModel
from moh.models.loading import load_causal_lm, load_tokenizer
from moh.routing import Router

ALLOCATIONS = ("even", "sensitivity")
"""How `moh.convert` hands out the heads: the same number in every layer, or more to layers that need them more."""

_DIFFUSION_MODELS = ("DiTTransformer2DModel", "MoHDiTTransformer2DModel")


def convert(
    model_or_path: nn.Module | str | Path,
    *,
    shared_heads: int | Sequence[int],
    active_heads: int | Sequence[int],
    router: str = "linear",
    calibration: Any = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    calibration_tokens: int = 12_288,
    seq_len: int | None = None,
    batch_size: int = 4,
    allocation: str = "even",
    refit_output: bool = False,
    router_aux_loss_coef: float = 0.0,
    progress: bool = True,
) -> Any:
    """Turn a pretrained dense language, image or diffusion model into a MoH model with the same weights.

    Args:
        model_or_path: a transformers model of the Llama family (Llama, Mistral, Qwen2, SmolLM), a `ViTModel` or
            `ViTForImageClassification` of transformers, or a timm `VisionTransformer` (vit_*, deit_*, deit3_*, ...,
            distilled ones too); or a directory to load one from, a hub name or .gguf file of a language model, or
            "hf-hub:NAME" of a timm model. Or a diffusers `DiTTransformer2DModel`, a dense DiT of ours, or a directory of
            one or of a pipeline with one; these are converted without calibration (`moh.conversion.dit`). A model that
            is passed stays as it is: its weights are copied.
        shared_heads: h_s, heads that every token uses, or their indices. A number means the ones with the largest
            mean contribution where a router is fitted, else the first ones.
        active_heads: k, routed heads that each token activates; a number, or one per layer.
        router: "linear" (the contribution router, fitted), "query_norm" (the paper's, nothing to fit), "two_stage"
            or "single_stage" (learned; fitted to the contributions' order so that training starts near the dense model).
        calibration: for a language model texts, sequences of token ids, or token ids `[n, N]`; for an image model
            images `[n, C, H, W]`, normalised for it, or batches of them (with or without labels, as a DataLoader gives
            them). Not looked at by router="query_norm". An image model takes a learned router without it too: gates
            are then 1 up to 1e-6, and which heads a token uses is random.
        tokenizer: for texts; default is the one saved with the model.
        calibration_tokens: at most so many tokens of `calibration` are used; each patch of an image is one.
        seq_len: texts are packed into blocks of so many tokens; None means 512.
        batch_size: blocks or images per forward pass.
        allocation: "even", or "sensitivity" to spend the same total unevenly, by an estimate of what each layer
            loses (`moh.conversion.allocation`).
        refit_output: fit W_O anew so that the kept heads make up for the skipped ones. With all heads active W_O stays
            the same; otherwise the model is tied to this budget of heads.
        router_aux_loss_coef: weight of the load-balance loss in `outputs.loss` (0: none) of a transformers model.
        progress: show progress bars.

    Returns:
        the MoH model, in evaluation mode: a `MoHLlamaForCausalLM`, `MoHViTModel`, `MoHViTForImageClassification` or
        `MoHDiTTransformer2DModel`, or a timm model of the same class as before (`moh.models.vit.save_pretrained` saves
        it). With all heads active and `refit_output=False` its outputs are the original's (nearly, with a fitted
        two-stage router).

    Raises:
        ValueError: the model can't be converted, or an argument is out of range or missing; nothing was changed.

    Examples:
        >>> model = moh.convert("HuggingFaceTB/SmolLM2-135M", shared_heads=4, active_heads=3,
        ...                     calibration=texts, allocation="sensitivity", refit_output=True)  # doctest: +SKIP
        >>> model.save_pretrained("smollm2-moh")  # doctest: +SKIP
        >>> dense = timm.create_model("deit3_small_patch16_224", pretrained=True)  # doctest: +SKIP
        >>> model = moh.convert(dense, shared_heads=1, active_heads=3, calibration=images)  # doctest: +SKIP
    """
    if _is_diffusion_model(model_or_path):
        if calibration is not None or allocation != "even" or refit_output or router_aux_loss_coef:
            raise ValueError(
                "calibration, allocation, refit_output and router_aux_loss_coef must be left out for a diffusion model: "
                "it is converted without calibration, and its training weighs the load-balance loss"
            )
        from moh.conversion.dit import convert_dit

        return convert_dit(model_or_path, shared_heads=shared_heads, active_heads=active_heads, router=router)
    dense = _dense_model(model_or_path, router)
    layers = _requested_layers(dense, shared_heads, active_heads, router)
    _check(dense, router, allocation, refit_output, shared_heads, calibration, batch_size)
    refusal = dense.refusal(router=router, refit_output=refit_output, router_aux_loss_coef=router_aux_loss_coef)
    if refusal is not None:
        raise ValueError(refusal)
    routers: Sequence[Router] = []
    output_weights: list[Tensor] = []
    if calibration is not None and router != "query_norm":
        texts = isinstance(dense, DenseLanguageModel)
        if tokenizer is None and texts and not isinstance(model_or_path, nn.Module):
            tokenizer = load_tokenizer(model_or_path)
        samples = dense.samples(calibration, max_tokens=calibration_tokens, tokenizer=tokenizer, seq_len=seq_len)
        calibrator = Calibrator(dense, samples, batch_size, progress)
        routers = calibrator.fit_routers(layers)
        if allocation == "sensitivity":
            total = sum(c.num_shared + c.active_heads for c in layers)
            routers = calibrator.reallocate(routers, calibrator.costs(routers), total)
        layers = [r.config for r in routers]
        if refit_output:
            output_weights = calibrator.refit_outputs(routers)
    return dense.build(layers, routers, output_weights, router_aux_loss_coef=router_aux_loss_coef)


def _is_diffusion_model(model_or_path: nn.Module | str | Path) -> bool:
    if isinstance(model_or_path, nn.Module):
        return type(model_or_path).__name__ in _DIFFUSION_MODELS
    folder = Path(model_or_path).expanduser()
    for file in (folder / "config.json", folder / "transformer" / "config.json"):
        try:
            config = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        return isinstance(config, dict) and config.get("_class_name") in _DIFFUSION_MODELS
    return False


def _dense_model(model_or_path: nn.Module | str | Path, router: str) -> DenseModel:
    """The adapter of the model's family.

    Raises:
        ValueError: the model belongs to none.
    """
    given = isinstance(model_or_path, nn.Module)
    model: Any = model_or_path if isinstance(model_or_path, nn.Module) else _load(model_or_path)
    if isinstance(model, PreTrainedModel):
        if model.config.model_type in ("vit", "moh_vit"):
            from moh.conversion.transformers_vit import DenseTransformersViT

            return DenseTransformersViT(model)
        return DenseLanguageModel(model, router, copied=given)
    if any(kind.__module__.startswith(("timm.", "moh.models.transnext")) for kind in type(model).__mro__):
        from moh.conversion.timm_vit import DenseTimmViT

        return DenseTimmViT(model)
    raise ValueError(
        "model must be a language model of the Llama family or a ViT of transformers, or a timm VisionTransformer, "
        f"got {type(model).__name__} (for diffusion transformers there is moh.conversion.dit.convert_dit)"
    )


def _load(path: str | Path) -> Any:
    if str(path).startswith("hf-hub:"):
        from moh.models.image_loading import load_image_classifier

        return load_image_classifier(path)
    try:
        config = json.loads((Path(path).expanduser() / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return load_causal_lm(path)  # which says what is wrong
    if isinstance(config, dict) and "architecture" in config:
        from moh.models.image_loading import load_image_classifier

        return load_image_classifier(Path(path))
    if isinstance(config, dict) and config.get("model_type") in ("vit", "moh_vit"):
        bare = "ViTModel" in (config.get("architectures") or ())  # without a classifier, which would be a random one
        auto = AutoModel if bare else AutoModelForImageClassification
        return auto.from_pretrained(Path(path).expanduser(), use_safetensors=True)
    return load_causal_lm(path)


def _requested_layers(
    dense: DenseModel, shared_heads: int | Sequence[int], active_heads: int | Sequence[int], router: str
) -> list[MoHConfig]:
    """Each layer's heads as asked for."""
    count = len(dense.attentions)
    active = [active_heads] * count if isinstance(active_heads, int) else list(active_heads)
    if len(active) != count:
        raise ValueError(
            f"active_heads must be a number or have one entry per layer ({count}), got {len(active)} entries"
        )
    return [MoHConfig(dense.num_heads, shared_heads, k, router) for k in active]


def _check(
    dense: DenseModel,
    router: str,
    allocation: str,
    refit_output: bool,
    shared_heads: int | Sequence[int],
    calibration: object,
    batch_size: int,
) -> None:
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    if allocation not in ALLOCATIONS:
        raise ValueError(f"allocation must be one of {', '.join(map(repr, ALLOCATIONS))}, got {allocation!r}")
    if router != "linear" and (allocation != "even" or refit_output):
        raise ValueError(f"allocation='sensitivity' and refit_output=True need router='linear', got router={router!r}")
    if allocation == "sensitivity" and not isinstance(shared_heads, int):
        raise ValueError("shared_heads must be a number for allocation='sensitivity', got a list of heads")
    if calibration is None and dense.needs_calibration(router):
        kind = "texts or token ids" if isinstance(dense, DenseLanguageModel) else "images"
        raise ValueError(f"calibration must be given for router={router!r}: {kind} to fit the router on")
