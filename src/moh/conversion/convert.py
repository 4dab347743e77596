"""`moh.convert`: a pretrained dense model -> the same model with MoH attention, calibrated in closed form.

No gradient step is taken; see `moh.training` for that. Query-norm router: the paper's; the other fits: ours. Each kind
of model has one adapter: `transformers`, `timm`, `diffusers`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from moh.config import FIXED
from moh.conversion.calibrator import Calibrator, dial_costs, keep_output_changes, needed_heads
from moh.conversion.dense import DenseModel, OutputWeight, check_weights
from moh.conversion.layer_kinds import LayerKinds
from moh.conversion.requested import check_fit, check_layers, check_shares, requested_layers, requested_total
from moh.conversion.transformers import DenseTextModel, adapter
from moh.data.text.blocks import are_texts
from moh.models.card import describe
from moh.models.heads import requested_share
from moh.models.hub import kind_at, timm_name
from moh.models.kinds import DIFFUSION_TRANSFORMERS, kind_of
from moh.models.transformers.loading import load_as, load_causal_lm, load_config, load_tokenizer
from moh.routing import Router, router_class


def convert(
    model_or_path: Any,
    *,
    share: float | None = None,
    shared_heads: int | Sequence[int] | None = None,
    active_heads: int | Sequence[int] | None = None,
    router: str | None = None,
    layers: str | None = None,
    routing_unit: str = "head",
    calibration: Any = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    calibration_tokens: int = 49_152,
    seq_len: int | Sequence[int] | None = None,
    batch_size: int = 4,
    allocation: str | None = None,
    refit_output: bool | None = None,
    shares: Sequence[float] | None = None,
    router_aux_loss_coef: float = 0.0,
    copy_weights: bool = True,
    progress: bool = True,
) -> Any:
    """Turn a pretrained dense language, image or diffusion model into a MoH model with the same weights, but for a refitted W_O.

    Args:
        model_or_path: a language model of transformers (Llama, Mistral, Qwen2, SmolLM, Qwen3, Gemma, Phi, Phi-3, OLMo 2,
            Granite, Cohere, StarCoder 2, GPT-NeoX, LFM3, GPT-2, OPT), an encoder (BERT, MiniLM, RoBERTa, XLM-R, ModernBERT),
            a ViT, DeiT or DINOv2, or a timm `VisionTransformer` (vit_*, deit_*, deit3_*, ..., distilled ones too); or a
            directory to load one from, a hub name ("hf-hub:NAME" too for timm's), or a .gguf file of a language model. Or a
            diffusers `DiTTransformer2DModel`, a dense DiT of ours, a `DiTPipeline`, or a directory or hub name of one of
            these; they are converted without calibration (`moh.conversion.diffusers`). A model that is passed stays as it
            is, as its weights are copied, unless `copy_weights` is False.
        share: share of all heads that tokens use, shared ones included, in (0, 1]; None means 0.75, unless
            `active_heads` is given. Layers get the nearest number of heads that they allow; with uneven layers
            (`allocation`, `layers`) the sum over all layers is the nearest.
        shared_heads: instead of `share`: h_s, heads that every token uses, or their indices. A number means the ones with
            the largest mean contribution where a router is fitted, else the first ones. None means 2 in 9, or half with the
            paper's router (`Router.shared_share`); must be given with `active_heads` for a diffusion model.
        active_heads: instead of `share`: k, routed heads that each token activates; a number, or one per layer. Where
            nothing is routed, the heads that a layer keeps, `shared_heads` being None.
        router: "linear" (the contribution router, fitted), "threshold" (the same, but a token uses as many heads as it
            needs, and `share` and `active_heads` are averages over the calibration's tokens), "query_norm" (the paper's,
            nothing to fit), "two_stage" or "single_stage" (learned; fitted to the contributions' order so that training
            starts near the dense model), or "fixed": the same heads for every token, the others cut out of the
            projections, in models of transformers. None means "threshold" for a language model that generates, with
            routing_unit="head"; "fixed" with layers="drop"; "two_stage" for a diffusion model; else "linear".
        layers: what may become of a layer, by what it is estimated or measured to cost. "keep": it keeps some heads, all
            routed, or all fixed. "drop": it keeps all of its heads, or has no attention at all, no cache and no
            queries, keys and values; with `refit_output` it then adds a linear map of its input. "mix": it is routed, fixed
            or without heads, whatever costs least. The last two are for a language model that generates and take the
            total of `share`, or of `active_heads` and `shared_heads`. None means "mix" for router="fixed" with heads by
            `allocation="sensitivity"`, else "keep".
        routing_unit: what a token chooses (`moh.MoHConfig`): "head", or, in a language model with grouped-query
            attention, "group_balanced" or "kv_group".
        calibration: for a language model texts, sequences of token ids, or token ids `[n, N]`; for an image model
            images `[n, C, H, W]`, normalised for it, or batches of them (with or without labels, as a DataLoader gives
            them). Not used by router="query_norm". For an image model learned routers don't need it: gates are
            then 1 up to 1e-6, and a token's heads are random.
        tokenizer: for texts; default is the one saved with the model.
        calibration_tokens: up to this many tokens of `calibration` are used; each patch of an image is one.
        seq_len: texts are packed into blocks of this many tokens, or into blocks of several lengths, with as many tokens of
            each. None means 512, or 128 for an encoder, or the model's positions if these are fewer; [512, 4096] for a language
            model that generates, if it has so many positions, `calibration_tokens` are at least 49,152 and the texts at least
            half as long: what a model finds in long texts depends on it.
        batch_size: blocks or images per forward pass; of several lengths, blocks of the shortest.
        allocation: "even", or "sensitivity" to distribute the same total unevenly, by an estimate of what each
            layer loses (`moh.conversion.passes.layer_costs`). None means what came out best: "sensitivity" for a
            language model that generates, with router "threshold" or "linear" and heads given as a share or as numbers,
            else "even".
        refit_output: refit W_O so that the kept heads make up for the skipped ones; in a language model that generates
            and whose layers get uneven numbers of heads, routers and allocation take it into account (docs/method.md, M18). With
            all heads active W_O stays the same; otherwise the model is tied to this number of heads. None means what came
            out best: True for a language model that generates, with such a router and without `shares`, else False.
        shares: shares of all heads, such as [8 / 9, 7 / 9, 6 / 9], that the dial of this one model then supports
            (`moh.set_active_heads(model, share)`): W_O is refitted for each number of heads that a layer uses at them and
            kept as low-rank changes; with all heads active it is the original's. `share`, or the numbers of heads, set
            the dial's first position. For models of transformers with such a router.
        router_aux_loss_coef: weight of the load-balance loss in the model's own loss, if it has one, and in training in the
            gradient of any other loss; 0 for none.
        copy_weights: False shares a passed model's weights with the MoH model, which then takes hardly more memory than the
            dense model alone. Don't use that one afterwards: training or the dial may change its weights. For language and
            image models; a model that is loaded from a path is never held twice.
        progress: show progress bars.

    Returns:
        the MoH model, in evaluation mode: a class of `moh.models.transformers` (`MoHLlamaForCausalLM` from a
        `LlamaForCausalLM`, ...), a `MoHDiTTransformer2DModel` (in a pipeline, if one is passed), or a timm model of the
        same class as before (`moh.models.timm.save_pretrained` saves it). With all heads active and `refit_output=False`
        its outputs are the original's (nearly, with a fitted two-stage router).

    Raises:
        ValueError: the model can't be converted, holds NaN or infinity or computes them on the calibration, or an argument
            is out of range or missing; nothing was changed.

    Examples:
        >>> model = moh.convert("HuggingFaceTB/SmolLM2-135M", share=0.75, calibration=texts)  # doctest: +SKIP
        >>> model.save_pretrained("smollm2-moh")  # doctest: +SKIP
        >>> dense = timm.create_model("deit3_small_patch16_224", pretrained=True)  # doctest: +SKIP
        >>> model = moh.convert(dense, share=0.5, calibration=images)  # doctest: +SKIP
    """
    share = requested_share(share, shared_heads=shared_heads, active_heads=active_heads)
    if _is_diffusion(model_or_path):
        unused = dict(
            calibration=calibration, tokenizer=tokenizer, seq_len=seq_len, refit_output=refit_output, shares=shares
        )
        unused["allocation"] = allocation == "sensitivity"
        if given := [name for name, value in unused.items() if value is not None and value is not False]:
            raise ValueError(
                f"{', '.join(given)} must be left out for a diffusion model: it is converted without calibration"
            )
        if not copy_weights:
            raise ValueError("copy_weights must be True for a diffusion model")
        if layers is not None:
            raise ValueError(
                f"layers must be left out for a diffusion model, got {layers!r}: its layers all keep heads"
            )
        if routing_unit != "head":
            raise ValueError(
                "routing_unit must be 'head' for a diffusion model, whose heads don't share keys and values in groups, "
                f"got {routing_unit!r}"
            )
        from moh.conversion.diffusers import convert_dit

        return convert_dit(
            model_or_path,
            share=share,
            shared_heads=shared_heads,
            active_heads=active_heads,
            router="two_stage" if router is None else router,
            router_aux_loss_coef=router_aux_loss_coef,
        )
    if router is None and layers == "drop":
        router = FIXED
    dense = _dense_model(model_or_path, router or "linear", copy_weights=copy_weights)
    check_weights(dense.model)
    generates = isinstance(dense, DenseTextModel) and dense.model.can_generate()
    router = router or ("threshold" if generates and routing_unit == "head" else "linear")
    requested = requested_layers(dense, share, shared_heads, active_heads, router, routing_unit)
    kind = router_class(router)
    best = (kind.ranks_heads or router == FIXED) and generates
    if allocation is None:
        numbers = isinstance(shared_heads, int | None) and isinstance(active_heads, int | None)
        allocation = "sensitivity" if best and numbers else "even"
    if refit_output is None:
        refit_output = (best or router == FIXED) and shares is None
    if layers is None:
        layers = "mix" if router == FIXED and generates and allocation == "sensitivity" else "keep"
    check_layers(layers, router, allocation, shares, generates=generates)
    check_fit(dense, router, allocation, refit_output, shared_heads, calibration, batch_size)
    if shares is not None:
        check_shares(dense, shares, router=router, refit_output=refit_output)
    refits = refit_output or shares is not None
    may_be_fixed = FIXED if layers == "mix" else router
    refusal = dense.refusal(router=may_be_fixed, refit_output=refits, router_aux_loss_coef=router_aux_loss_coef)
    if refusal is not None:
        raise ValueError(refusal)
    routers: list[Router] = []
    output_weights: list[OutputWeight] = []
    costs: Tensor | None = None
    change_numbers: list[int] = []
    changes: list[list[tuple[Tensor, Tensor]]] = []
    if calibration is not None and kind.is_fitted:
        texts = isinstance(dense, DenseTextModel) and are_texts(calibration)
        if tokenizer is None and texts and not isinstance(model_or_path, nn.Module):
            tokenizer = load_tokenizer(model_or_path)
        samples = dense.samples(calibration, max_tokens=calibration_tokens, tokenizer=tokenizer, seq_len=seq_len)
        calibrator = Calibrator(dense, samples, batch_size, progress)
        # Only for language models with uneven layers: it made those with even ones worse, and encoders too
        counts_on_refit = refits and generates and allocation == "sensitivity"
        total = requested_total(requested, share)
        if router == FIXED or layers == "mix":
            kinds = LayerKinds(calibrator, requested, refitted=refit_output, total=total)
            chosen, costs = (kinds.as_requested(), None) if allocation == "even" else kinds.choose(layers)
            routers, output_weights = kinds.assemble(chosen)
        else:
            routers = calibrator.fit_routers(requested, refitted=counts_on_refit)
            if allocation == "sensitivity":
                costs = calibrator.costs(routers, refitted=counts_on_refit)
                routers = calibrator.reallocate(routers, costs, total)
                if generates and routing_unit == "head" and shared_heads is None:
                    routers = calibrator.share_copying_heads(routers)
            if refit_output:
                output_weights = [OutputWeight(weight) for weight in calibrator.refit_outputs(routers)]
        requested = [r.config for r in routers]
        if shares is not None and (change_numbers := needed_heads(routers, costs, shares)):
            changes = calibrator.fit_output_changes(routers, change_numbers)
    model = dense.build(requested, routers, output_weights, router_aux_loss_coef=router_aux_loss_coef)
    if isinstance(model, PreTrainedModel) and costs is not None:
        model.config.head_costs = dial_costs(costs)
    if changes:
        keep_output_changes(model, change_numbers, changes)
    check_weights(model)  # what was fitted may be out of the range of float16
    describe(model, base=_base(model_or_path, dense.model), facts=_facts(routers, calibration_tokens, refits))
    return model


def _base(model_or_path: nn.Module | str | Path, dense: Any) -> str | Path | None:
    """The dense model's place, for the model card."""
    if not isinstance(model_or_path, nn.Module):
        return model_or_path
    return getattr(getattr(dense, "config", None), "_name_or_path", None) or None


def _facts(routers: Sequence[Router], calibration_tokens: int, refits: bool) -> dict[str, str]:
    """How the conversion was done, for the model card."""
    facts = {"calibrated on": f"up to {calibration_tokens:,} tokens"} if routers else {}
    return facts | ({"output projections": "refitted, without training"} if refits and routers else {})


def _is_diffusion(model_or_path: Any) -> bool:
    if type(model_or_path).__name__ == "DiTPipeline":  # not imported: diffusers is an extra
        return True
    if isinstance(model_or_path, nn.Module):
        return type(model_or_path).__name__ in DIFFUSION_TRANSFORMERS
    return kind_at(model_or_path).task == "diffusion"


def _dense_model(model_or_path: nn.Module | str | Path, router: str, *, copy_weights: bool) -> DenseModel:
    """The adapter of the model's family.

    Raises:
        ValueError: the model belongs to no family.
    """
    copied = copy_weights and isinstance(model_or_path, nn.Module)
    model: Any = model_or_path if isinstance(model_or_path, nn.Module) else load_dense(model_or_path)
    if isinstance(model, PreTrainedModel):
        return adapter(model, router, copied=copied)
    if any(kind.__module__.startswith(("timm.", "moh.models.timm.transnext")) for kind in type(model).__mro__):
        from moh.conversion.timm import DenseTimmViT

        return DenseTimmViT(model, copied=copied)
    raise ValueError(
        "model must be a language model, an encoder or a ViT of transformers, or a timm VisionTransformer, got "
        f"{type(model).__name__} (with peft pass model.merge_and_unload(); for diffusion transformers use "
        "moh.conversion.diffusers.convert_dit)"
    )


def load_dense(
    path: str | Path,
    *,
    dtype: torch.dtype | str = "auto",
    device: torch.device | None = None,
    device_map: Any = None,
    revision: str | None = None,
) -> Any:
    """The dense model at a directory, hub name or .gguf file, of the class that it was saved as; not for diffusion models.

    Args:
        dtype: of the weights; "auto" keeps the checkpoint's.
        device: where the model goes; None leaves it on the CPU.
        device_map: for a model of transformers, as in its `from_pretrained`, instead of `device`.
        revision: branch, tag or commit of a hub name.

    Raises:
        ValueError: there is no such model, or it can't be read.
    """
    kind = kind_at(path, revision=revision)
    if kind.library == "timm":
        from moh.models.timm.loading import load_image_classifier  # needs the extra `vision`

        if device_map is not None:
            raise ValueError(
                f"device_map must be None for a model of timm, which stays on one device, got {device_map!r}"
            )
        model = load_image_classifier(timm_name(path, revision), device=device)
        return model if isinstance(dtype, str) else model.to(dtype)
    options: dict[str, Any] = {"dtype": dtype, "device": device, "revision": revision}
    options |= {} if device_map is None else {"device_map": device_map}
    if Path(path).suffix == ".gguf":
        return load_causal_lm(path, **options)
    return load_as(dense_class(load_config(path, revision=revision)), path, **options)


def dense_class(config: PreTrainedConfig) -> Any:
    """The class of transformers that a model with this configuration was saved as, or else an Auto class that knows it."""
    for name in config.architectures or ():
        # An Auto class would load a text classifier, say, as a language model with a new, random head
        found = getattr(transformers, name, None)
        if found is not None and found.config_class is type(config):
            return found
    # by the configuration, because a hub name doesn't show the kind
    return AutoModel if kind_of(config.to_dict()).task == "images" else AutoModelForCausalLM
