"""Promises of converted vision transformers: the original with all heads active; fits as defined; clear refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("timm", reason="the vision extra is not installed")

import timm
from timm.layers.attention import Attention
from timm.models import VisionTransformer
from transformers import BeitConfig, BeitForImageClassification, ViTConfig, ViTForImageClassification, ViTModel

import moh
from moh import convert, record_routing
from moh.conversion.dense import make_undecided
from moh.conversion.fit import ROUTER_RIDGE
from moh.conversion.passes import collect_contributions, layer_costs
from moh.conversion.timm import DenseTimmViT
from moh.models.timm import MoHViTAttention
from moh.routing import LinearRouter, Router

SMALL = dict(embed_dim=32, depth=2, num_heads=4, img_size=32, patch_size=8, num_classes=5)
TRANSFORMERS = dict(
    hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, image_size=32, patch_size=8
)
HEADS = dict(shared_heads=1, active_heads=2, progress=False)


def stirred(model: nn.Module) -> Any:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() >= 2 or "bias" in name:
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def timm_model(name: str = "vit_tiny_patch16_224", **options: Any) -> Any:
    return stirred(timm.create_model(name, **SMALL | options))


def transformers_model(kind: type = ViTForImageClassification) -> Any:
    return stirred(kind(ViTConfig(**TRANSFORMERS, num_labels=5)))


MODELS = {
    "vit": timm_model,
    "deit": lambda: timm_model("deit_tiny_patch16_224"),
    "deit-distilled": lambda: timm_model("deit_tiny_distilled_patch16_224"),
    "deit3-layer-scale": lambda: timm_model("deit3_small_patch16_224", init_values=0.3),
    "registers-and-qk-norm": lambda: timm_model(
        qk_norm=True, reg_tokens=2, class_token=False, global_pool="avg", no_embed_class=True
    ),
    "attention-pool": lambda: timm_model(class_token=False, global_pool="map"),
    "parallel-things": lambda: timm_model("vit_small_patch16_18x2_224"),
    "by-hand": lambda: stirred(VisionTransformer(**SMALL)),
    "transformers": transformers_model,
    "transformers-backbone": lambda: transformers_model(ViTModel),
}


def images(count: int = 24) -> Tensor:
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(2))


def output(model: nn.Module, x: Tensor) -> Tensor:
    result = model(x)
    if isinstance(result, Tensor):
        return result
    return result.logits if "logits" in result else result.pooler_output


def assert_same(got: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    assert (got - expected).abs().max() <= tolerance * expected.abs().max()


@pytest.mark.parametrize("router", ["linear", "query_norm", "two_stage", "two_stage-fitted"])
@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_with_all_heads_active_the_output_is_the_originals(name, router) -> None:
    if name == "registers-and-qk-norm" and router == "query_norm":
        pytest.skip("refused, see below")
    dense = MODELS[name]()
    before = {name: tensor.clone() for name, tensor in dense.state_dict().items()}
    options = {"linear": dict(calibration=images()), "two_stage-fitted": dict(calibration=images())}.get(router, {})
    kind = router.removesuffix("-fitted")
    model = convert(dense, shared_heads=1, active_heads=3, router=kind, progress=False, **options)
    x = images(3)
    assert_same(output(model, x), output(dense, x), 0.05 if router.endswith("fitted") else 1e-5)
    with record_routing(model) as routing:
        output(model, x)
    assert routing.share() == 1 and len(routing) == len([m for m in model.modules() if isinstance(m, Router)])
    assert not model.training
    assert all(torch.equal(before[name], tensor) for name, tensor in dense.state_dict().items())
    kept = {name: tensor for name, tensor in model.state_dict().items() if ".router." not in name}
    assert kept.keys() == before.keys() and all(torch.equal(kept[name], before[name]) for name in kept)
    shared_memory = {t.data_ptr() for t in kept.values()} & {t.data_ptr() for t in dense.state_dict().values()}
    assert not shared_memory


@pytest.mark.parametrize("name", ["vit", "deit-distilled", "transformers"])
@torch.no_grad()
def test_fewer_heads_are_used_and_the_model_stays_of_its_class(name) -> None:
    dense = MODELS[name]()
    model = convert(dense, shared_heads=1, active_heads=[1, 2], calibration=images(), progress=False)
    with record_routing(model) as routing:
        output(model, images(3))
    assert routing.share() == pytest.approx((2 + 3) / 8)
    assert type(model) is type(dense) or name == "transformers"


class Seen:
    """A timm layer's input x `[T, C]`, its heads z `[T, H, D]` and what it adds to the residual stream, float64."""

    def __init__(self, dense: VisionTransformer, x: Tensor) -> None:
        self.x: list[Tensor] = []
        self.z: list[Tensor] = []
        handles = []
        for block in dense.blocks:
            handles.append(
                block.attn.register_forward_pre_hook(lambda _, args: self.x.append(args[0].flatten(0, 1).double()))
            )
            handles.append(
                block.attn.proj.register_forward_pre_hook(
                    lambda _, args: self.z.append(args[0].flatten(0, 1).unflatten(-1, (4, -1)).double())
                )
            )
        with torch.no_grad():
            dense(x)
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("scaled", [False, True], ids=["plain", "layer-scale"])
@torch.no_grad()
def test_the_router_predicts_what_heads_add_to_the_residual_stream(scaled) -> None:
    dense, x = timm_model("deit3_small_patch16_224" if scaled else "vit_tiny_patch16_224"), images()
    if scaled:
        for block in dense.blocks:
            nn.init.uniform_(block.ls1.gamma, 0.1, 2.0)
    model = convert(dense, **HEADS, calibration=x)
    seen = Seen(dense, x)
    for index, (block, converted) in enumerate(zip(dense.blocks, model.blocks, strict=True)):
        weight = block.attn.proj.weight.double()
        if scaled:
            weight = weight * block.ls1.gamma.double()[:, None]
        c = torch.stack([(seen.z[index][:, h] @ weight[:, 8 * h : 8 * h + 8].T).norm(dim=-1) for h in range(4)], -1)
        router = converted.attn.router
        assert router.config.shared_indices == (int(c.mean(0).argmax()),)
        design = nn.functional.pad(seen.x[index], (0, 1), value=1.0)
        penalty = ROUTER_RIDGE * design[:, :-1].square().sum(0).mean() * torch.eye(33, dtype=torch.float64)
        penalty[-1] = 0
        best = torch.linalg.solve(design.T @ design + penalty, design.T @ c)
        predicted = router.contribution(seen.x[index].float()).double()
        torch.testing.assert_close(predicted, design @ best, rtol=1e-3, atol=1e-3 * float(c.mean()))


@torch.no_grad()
def test_calibration_can_be_batches_with_labels_and_is_cut_at_the_number_of_tokens() -> None:
    dense, x = timm_model(), images(8)
    batches = [(x[:3], torch.zeros(3)), (x[3:6], torch.zeros(3)), (x[6:], torch.zeros(2))]
    forms = [x, batches, iter(batches), [b[0] for b in batches], [{"pixel_values": b[0]} for b in batches]]
    weights = [convert(dense, **HEADS, calibration=form).blocks[0].attn.router.contribution.weight for form in forms]
    assert all(torch.equal(weight, weights[0]) for weight in weights[1:])
    adapter = DenseTimmViT(dense)
    (taken,) = adapter.samples(x, max_tokens=3 * 17 + 5, tokenizer=None, seq_len=None)  # 16 patches and a class token
    assert torch.equal(taken, x[[0, 3, 7]])
    (taken,) = adapter.samples(iter(batches), max_tokens=5 * 17, tokenizer=None, seq_len=None)
    assert torch.equal(taken, x[:5])


@torch.no_grad()
def test_a_refitted_output_projection_is_nearer_to_the_original() -> None:
    for dense in (timm_model(), transformers_model()):
        x = images()
        options = dict(shared_heads=1, active_heads=1, calibration=x, progress=False)
        plain, refitted = convert(dense, **options), convert(dense, **options, refit_output=True)
        expected = output(dense, x)
        errors = [(output(model, x) - expected).square().mean() for model in (plain, refitted)]
        assert errors[1] < errors[0]
        assert_same(output(convert(dense, **options | dict(active_heads=3), refit_output=True), x), expected)


@torch.no_grad()
def test_an_uneven_share_has_the_same_total() -> None:
    options = dict(shared_heads=1, active_heads=1, calibration=images(), progress=False, allocation="sensitivity")
    dense = timm_model(depth=3, num_heads=8)
    model = convert(dense, **options | dict(active_heads=4))
    layers = [m.config for m in model.modules() if isinstance(m, Router)]
    assert sum(c.num_shared + c.active_heads for c in layers) == 15
    assert all(p.requires_grad and p.grad is None for p in dense.parameters())


def test_costs_come_from_labels_drawn_from_the_models_own_predictions() -> None:
    dense, x = timm_model(), images(6)
    adapter = DenseTimmViT(dense)
    routers = [LinearRouter(moh.MoHConfig(4, 1, 1, "linear"), 32) for _ in range(2)]
    costs = layer_costs(adapter, routers, iter([x]))
    factors = [torch.ones(6, 17, 4, 1, requires_grad=True) for _ in range(2)]
    handles = [
        block.attn.proj.register_forward_pre_hook(
            lambda _, args, factor=factor: ((args[0].unflatten(-1, (4, -1)) * factor).flatten(2),)
        )
        for block, factor in zip(dense.blocks, factors, strict=True)
    ]
    logits = dense(x)
    labels = torch.multinomial(logits.detach().softmax(-1), 1, generator=torch.Generator().manual_seed(0))[:, 0]
    effects = torch.autograd.grad(nn.functional.cross_entropy(logits, labels, reduction="sum"), factors)
    for handle in handles:
        handle.remove()
    seen = Seen(dense, x)
    for index, effect in enumerate(effects):
        predicted = routers[index].contribution(seen.x[index].float()).detach()
        predicted[:, 0] = torch.inf
        ordered = effect.flatten(0, 1)[..., 0].double().gather(-1, predicted.argsort(-1, descending=True))
        for kept in range(5):
            expected = float(ordered[:, kept:].sum(-1).square().mean() / 2)
            assert costs[index, kept] == pytest.approx(expected, rel=1e-3, abs=1e-12)


def test_the_dense_model_keeps_its_mode_and_hooks_after_calibration() -> None:
    dense = timm_model().train()
    collect_contributions(DenseTimmViT(dense), iter([images(2)]))
    assert dense.training
    assert not any(module._forward_pre_hooks for module in dense.modules())


def test_an_undecided_router_weighs_all_heads_alike() -> None:
    router = moh.routing.TwoStageRouter(moh.MoHConfig(4, 2, 1), 32)
    make_undecided(router)
    gates = router(torch.randn(2, 50, 32)).gates
    assert torch.allclose(gates[gates != 0], torch.ones(()), atol=1e-4)
    assert len(gates.flatten(0, 1).ne(0).float().unique(dim=0)) == 2  # tokens still choose different heads


@torch.no_grad()
def test_a_converted_model_exports() -> None:
    model, x = convert(timm_model(), **HEADS, calibration=images()), images(2)
    torch.testing.assert_close(torch.export.export(model, (x,)).module()(x), model(x))


def with_adapter() -> Any:
    model = timm_model()
    model.blocks[1].attn.qkv = nn.Sequential(model.blocks[1].attn.qkv)
    return model


def own_attention() -> Any:
    class Own(Attention):
        pass

    model = timm_model()
    model.blocks[1].attn = Own(32, 4)
    return model


REFUSALS = {
    "convnet": (lambda: timm.create_model("resnet18"), {}, r"must be a timm VisionTransformer.*got ResNet"),
    "beit": (lambda: timm.create_model("beit_base_patch16_224", depth=1), {}, r"timm VisionTransformer .*got Beit"),
    "transnext": (lambda: timm.create_model("moh_transnext_micro32_dense"), {}, r"VisionTransformer .*MoHTransNeXt"),
    "parallel-blocks": (
        lambda: timm_model("vit_base_patch16_rpn_224", block_fn=timm.models.vision_transformer.ParallelScalingBlock),
        {},
        r"block 0 \(ParallelScalingBlock\) holds no timm.layers.Attention; .*vit_\*_patch",
    ),
    "own-attention": (own_attention, {}, r"block 1 \(Block\) holds no timm.layers.Attention"),
    "adapter": (with_adapter, {}, r"qkv of attention layer 1 is a Sequential: merge adapters"),
    "beit-of-transformers": (
        lambda: BeitForImageClassification(BeitConfig(**TRANSFORMERS)),
        {},
        r"model must be of a type among .*vit.*got 'beit'",
    ),
    "no-model": (lambda: nn.Linear(3, 3), {}, r"must be a language model, .* or a timm VisionTransformer, got Linear"),
    "moh": (lambda: convert(timm_model(), **HEADS, router="query_norm"), {}, "model is a MoH model already"),
    "moh-transformers": (lambda: convert(transformers_model(), **HEADS, router="query_norm"), {}, "MoH model already"),
    "qk-norm": (
        lambda: timm_model(qk_norm=True),
        dict(router="query_norm"),
        r"query_norm.*normalises its queries.*router='linear'",
    ),
    "no-images": (timm_model, dict(calibration=None), r"calibration must be given for router='linear': images"),
    "texts": (timm_model, dict(calibration=["a text"]), r"floating-point images \[n, C, H, W\].*got str"),
    "numbers": (timm_model, dict(calibration=torch.zeros(2, 3, 32, 32, dtype=torch.uint8)), r"got torch.uint8"),
    "empty": (timm_model, dict(calibration=[]), r"images \[n, C, H, W\].*got NoneType"),
    "wrong-size": (timm_model, dict(calibration=torch.zeros(2, 3, 40, 40)), r"images that the model can read, got"),
    "mixed-sizes": (
        lambda: timm_model(dynamic_img_size=True),
        dict(calibration=[torch.zeros(2, 3, 32, 32), torch.zeros(2, 3, 40, 40)]),
        r"images of one size",
    ),
    "nan": (timm_model, dict(calibration=torch.full((2, 3, 32, 32), torch.nan)), "must be finite"),
    "tokenizer": (timm_model, dict(seq_len=3), r"tokenizer and seq_len are for language models"),
    "aux-loss": (timm_model, dict(router_aux_loss_coef=-0.01), r"router_aux_loss_coef must be at least 0, got -0.01"),
    "no-classifier": (
        lambda: timm_model(num_classes=0),
        dict(allocation="sensitivity"),
        r"allocation='sensitivity' needs a classifier.*allocation='even'",
    ),
    "no-classifier-transformers": (
        lambda: transformers_model(ViTModel),
        dict(allocation="sensitivity"),
        r"allocation='sensitivity' needs a classifier",
    ),
    "too-many-heads": (timm_model, dict(active_heads=4), r"active_heads must be between 0 and .* = 3, got 4"),
    "layers": (timm_model, dict(active_heads=[1, 1, 1]), r"one entry per layer \(2\), got 3 entries"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSALS)
def test_what_can_not_be_converted_is_refused_and_left_as_it_was(name) -> None:
    make, options, message = REFUSALS[name]
    model = make().train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        convert(model, **dict(**HEADS, calibration=images(4)) | options)
    assert model.training
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    if name not in ("moh", "moh-transformers"):
        assert not any(isinstance(module, MoHViTAttention | Router) for module in model.modules())


def test_gated_or_normalised_heads_are_not_refitted() -> None:
    try:
        dense = timm_model(scale_attn_norm=True)
    except TypeError:
        pytest.skip("this timm has no scale_attn_norm")
    with pytest.raises(ValueError, match="refit_output must be False for a model that normalises or gates its heads"):
        convert(dense, **HEADS, calibration=images(), refit_output=True)
    with torch.no_grad():
        assert_same(convert(dense, shared_heads=1, active_heads=3, router="query_norm")(images(2)), dense(images(2)))


@torch.no_grad()
def test_a_directory_of_either_library_is_loaded_and_converted(tmp_path) -> None:
    transformers_model().save_pretrained(tmp_path / "transformers")
    dense = timm_model()
    timm.models.save_for_hf(dense, tmp_path / "timm", model_args=SMALL, safe_serialization=True)
    for directory, expected in (
        (tmp_path / "transformers", transformers_model()(images(2)).logits),
        (str(tmp_path / "timm"), dense(images(2))),
    ):
        model = convert(directory, shared_heads=1, active_heads=3, router="query_norm")
        assert_same(output(model, images(2)), expected)


def test_a_directory_without_a_classifier_gets_none(tmp_path) -> None:
    ViTModel(transformers_model().config).save_pretrained(tmp_path / "bare")
    converted = convert(tmp_path / "bare", shared_heads=1, active_heads=1, router="two_stage")
    assert type(converted).__name__ == "MoHViTModel"
