"""One converted model for a range of shares: a change of W_O per number of heads, switched by the dial."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

import moh
from moh.conversion.fit import low_rank_change, refit_output_projection
from moh.conversion.passes import OutputSums
from moh.models.dial import moh_routers
from moh.models.output_changes import OutputChanges, output_projection, routed_attentions

ALL_SHARES = [1.0, 0.75, 0.5]


@pytest.fixture
def convert(make_dense: Callable[..., Any], tokens: Tensor) -> Callable[..., tuple[Any, Any]]:
    """`convert(family, **options)`: a dense model, and the MoH model with one shared and one active head of four."""

    def run(family: str = "Llama", **options: Any) -> tuple[Any, Any]:
        dense = make_dense(family)
        given = dict(shared_heads=1, active_heads=1, calibration=tokens, progress=False, shares=ALL_SHARES)
        return dense, moh.convert(dense, **given | options)

    return run


@torch.no_grad()
def logits(model: Any, tokens: Tensor) -> Tensor:
    out: Tensor = model(tokens).logits
    return out


@pytest.mark.parametrize("family", ["Llama", "Qwen2"])
@pytest.mark.parametrize("allocation", ["even", "sensitivity"])
def test_with_all_heads_the_model_is_the_original(
    convert: Callable[..., Any], tokens: Tensor, family: str, allocation: str
) -> None:
    dense, model = convert(family, allocation=allocation)
    expected = logits(dense, tokens)
    assert not torch.allclose(logits(model, tokens), expected, rtol=1e-2)
    for _ in range(3):
        moh.set_active_heads(model, 1.0)
        torch.testing.assert_close(logits(model, tokens), expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))
        moh.set_active_heads(model, 0.5)


def test_a_family_that_keeps_its_weights_transposed_has_output_changes_too(tokens: Tensor) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    dense = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_positions=64, n_embd=32, n_layer=2, n_head=4)).eval()
    with torch.no_grad():
        for parameter in dense.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    given = dict(shared_heads=1, calibration=tokens, progress=False)
    model = moh.convert(dense, active_heads=1, shares=ALL_SHARES, **given)
    alone = moh.convert(dense, active_heads=2, refit_output=True, **given)
    moh.set_active_heads(model, 0.75)
    torch.testing.assert_close(logits(model, tokens), logits(alone, tokens), rtol=1e-3, atol=1e-3)
    moh.set_active_heads(model, 1.0)
    torch.testing.assert_close(logits(model, tokens), logits(dense, tokens), rtol=1e-5, atol=1e-5)


def test_an_image_model_of_transformers_has_output_changes_too(tmp_path: Path) -> None:
    from transformers import ViTConfig, ViTForImageClassification

    from moh.models.transformers import MoHViTForImageClassification

    sizes = dict(image_size=16, patch_size=4, hidden_size=32, intermediate_size=48, num_hidden_layers=2)
    dense = ViTForImageClassification(ViTConfig(**sizes, num_attention_heads=4, num_labels=3)).eval()
    images = torch.randn(8, 3, 16, 16)
    model = moh.convert(
        dense, shared_heads=1, active_heads=1, calibration=images, shares=ALL_SHARES, allocation="sensitivity",
        progress=False,
    )  # fmt: skip
    expected = logits(model, images)
    model.save_pretrained(tmp_path)
    loaded = MoHViTForImageClassification.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(logits(loaded, images), expected, rtol=1e-4, atol=1e-5)
    loaded.set_active_heads(1.0)
    torch.testing.assert_close(logits(loaded, images), logits(dense, images), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("share", [0.75, 0.5])
def test_each_share_is_the_model_converted_for_it_alone(
    convert: Callable[..., Any], tokens: Tensor, share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At full rank; experiments/budgets_in_one_model.py measures the loss of lower ranks on a real model."""
    _, model = convert()
    moh.set_active_heads(model, share)
    _, alone = convert(shares=None, refit_output=True, active_heads=int(4 * share) - 1)
    expected = logits(alone, tokens)
    torch.testing.assert_close(logits(model, tokens), expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))


def test_turning_the_dial_to_and_fro_loses_nothing(convert: Callable[..., Any], tokens: Tensor) -> None:
    _, model = convert()
    model.to(torch.bfloat16)
    for share in [1.0, 0.75]:  # a layer's first turn rounds the weight that the conversion gave it
        moh.set_active_heads(model, share)
    before = copy.deepcopy(model.state_dict())
    for share in [1.0, 0.5, 0.75] * 20:
        moh.set_active_heads(model, share)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name


@pytest.mark.parametrize("share", ALL_SHARES)
def test_a_saved_model_keeps_every_share(
    convert: Callable[..., Any], tokens: Tensor, tmp_path: Path, share: float
) -> None:
    _, model = convert(allocation="sensitivity")
    expected = {}
    for other in ALL_SHARES:
        moh.set_active_heads(model, other)
        expected[other] = logits(model, tokens)
    moh.set_active_heads(model, share)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.config.share == share
    torch.testing.assert_close(logits(loaded, tokens), expected[share])
    for other in ALL_SHARES:
        moh.set_active_heads(loaded, other)
        torch.testing.assert_close(logits(loaded, tokens), expected[other], rtol=1e-4, atol=1e-4)


def test_a_share_is_handed_out_as_the_conversion_for_it_would(convert: Callable[..., Any]) -> None:
    _, model = convert(allocation="sensitivity", active_heads=2)
    for k in (1, 2):
        moh.set_active_heads(model, (1 + k) / 4)
        _, alone = convert(allocation="sensitivity", active_heads=k, shares=None)
        assert [r.config.active_heads for r in moh_routers(model)] == [
            r.config.active_heads for r in moh_routers(alone)
        ]


def test_training_at_one_share_is_kept_at_the_others(convert: Callable[..., Any], tokens: Tensor) -> None:
    _, model = convert()
    weight = output_projection(routed_attentions(model)[0]).weight
    moh.set_active_heads(model, 1.0)
    original = weight.detach().clone()
    moh.set_active_heads(model, 0.5)
    with torch.no_grad():
        weight.add_(0.25)  # like an optimiser
    moh.set_active_heads(model, 1.0)
    torch.testing.assert_close(weight, original + 0.25, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("write", ["an adapter merged in", "a fused optimiser"])
def test_what_is_written_without_a_trace_is_kept_at_every_share(
    convert: Callable[..., Any], tokens: Tensor, write: str
) -> None:
    _, model = convert()
    weight = output_projection(routed_attentions(model)[0]).weight
    moh.set_active_heads(model, 1.0)
    original = weight.detach().clone()
    moh.set_active_heads(model, 0.5)
    if write == "a fused optimiser":
        weight.grad = -torch.ones_like(weight)
        torch.optim.AdamW([weight], lr=0.25, weight_decay=0.0, fused=True).step()
    else:
        weight.data += 0.25
    moh.set_active_heads(model, 1.0)
    torch.testing.assert_close(weight.detach(), original + 0.25, rtol=1e-5, atol=1e-5)


def test_a_merged_lora_is_merged_at_every_share(convert: Callable[..., Any], tokens: Tensor) -> None:
    peft = pytest.importorskip("peft")
    _, model = convert()
    moh.set_active_heads(model, 1.0)
    moh.set_active_heads(model, 0.5)
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["o_proj"], r=2, lora_alpha=8))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    expected = {}
    for share in ALL_SHARES:
        moh.set_active_heads(adapted, share)
        expected[share] = logits(adapted, tokens)
    merged = adapted.merge_and_unload()
    for share in ALL_SHARES:
        moh.set_active_heads(merged, share)
        torch.testing.assert_close(logits(merged, tokens), expected[share], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "heads, message",
    [
        (dict(active_heads=3), r"must be those that the model was saved with.*\[4, 4\] heads per layer.*turn the dial"),
        (dict(shared_heads=[[0, 1], [0, 1]]), "thresholds must hold 3 numbers"),
    ],
    ids=str,
)
def test_a_saved_model_is_not_loaded_with_heads_that_its_weights_are_not_for(
    convert: Callable[..., Any], tmp_path: Path, heads: dict[str, Any], message: str
) -> None:
    _, model = convert()
    moh.set_active_heads(model, 2)
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        AutoModelForCausalLM.from_pretrained(tmp_path, **heads)


def test_a_model_saved_in_the_former_format_is_refused_with_what_to_do(
    convert: Callable[..., Any], tmp_path: Path
) -> None:
    _, model = convert()
    model.save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(file.read_text().replace("output_changes", "output_budgets"))
    with pytest.raises(ValueError, match=r"output_budgets .* convert the dense model again, with moh.convert"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("shares", "active_heads", "heads"),
    [([0.75], 1, [2, 3]), ([1.0], 1, [2, 3]), ([1.0], 3, None)],
)
def test_where_the_dial_stands_first_has_its_change_too(
    convert: Callable[..., Any], shares: list[float], active_heads: int, heads: list[int] | None
) -> None:
    _, model = convert(shares=shares, active_heads=active_heads)
    kept = model.config.output_changes
    assert (kept and kept["heads"]) == heads


def test_changes_are_no_parameters(convert: Callable[..., Any]) -> None:
    dense, model = convert()
    trained = sum(p.numel() for n, p in model.named_parameters() if "router" not in n)
    assert trained == sum(p.numel() for p in dense.parameters())


def test_generation_with_the_cache_is_right_at_every_share(convert: Callable[..., Any]) -> None:
    _, model = convert()
    prompt = torch.randint(64, (2, 5))
    for share in ALL_SHARES:
        moh.set_active_heads(model, share)
        options = dict(max_new_tokens=8, do_sample=False, pad_token_id=0)
        assert torch.equal(model.generate(prompt, **options), model.generate(prompt, use_cache=False, **options))


def test_the_low_rank_change_is_the_refit_and_its_best_approximation() -> None:
    z = torch.randn(200, 24, dtype=torch.float64)
    gates = (torch.rand(200, 4) > 0.4).double().repeat_interleave(6, 1)
    g = z * gates
    sums = OutputSums(g.T @ g, g.T @ z)
    o_proj = torch.randn(16, 24)
    change = refit_output_projection(sums, o_proj) - o_proj
    left, right = low_rank_change(sums, o_proj, rank=99)
    torch.testing.assert_close(left @ right, change, rtol=1e-4, atol=1e-5)

    def misses(left: Tensor, right: Tensor) -> float:
        wanted, got = (g @ c.double().T for c in (change, left @ right))
        penalty = 0.1 * sums.gg.diagonal().mean() * (change - left @ right).double().square().sum()
        return float((wanted - got).square().sum() + penalty)

    left, right = low_rank_change(sums, o_proj, rank=5)
    u, s, vh = torch.linalg.svd(change)
    assert (left.shape, right.shape) == ((16, 5), (5, 24))
    assert misses(left, right) < misses(u[:, :5] * s[:5], vh[:5])


def test_between_two_numbers_of_heads_the_lower_ones_change_holds() -> None:
    changes = OutputChanges([4, 6], 1, torch.zeros(3, 3))
    assert [changes.index(n, 9) for n in (2, 4, 5, 6, 8, 9)] == [0, 0, 0, 1, 1, None]


def test_quantised_weights_are_refused_before_anything_changes(convert: Callable[..., Any]) -> None:
    _, model = convert()
    layer = output_projection(routed_attentions(model)[1])
    layer.weight = torch.nn.Parameter(layer.weight.detach().to(torch.int8), requires_grad=False)
    first = output_projection(routed_attentions(model)[0]).weight
    before = first.detach().clone()
    with pytest.raises(ValueError, match=r"quantised \(torch.int8\); turn the dial before quantising"):
        moh.set_active_heads(model, 1.0)
    assert torch.equal(first, before)
    assert [r.config.active_heads for r in moh_routers(model)] == [1, 1]


VIT = dict(img_size=16, patch_size=8, embed_dim=32, depth=2, num_heads=4, num_classes=5)


def timm_vit() -> Any:
    import timm

    return timm.create_model("vit_tiny_patch16_224", **VIT).eval()


def transformers_vit() -> Any:
    from transformers import ViTConfig, ViTForImageClassification

    sizes = dict(image_size=16, patch_size=8, hidden_size=32, intermediate_size=48, num_hidden_layers=2)
    return ViTForImageClassification(ViTConfig(**sizes, num_attention_heads=4, num_labels=5)).eval()


def diffusers_dit() -> Any:
    from diffusers import DiTTransformer2DModel

    torch.manual_seed(1)
    sizes = dict(num_attention_heads=4, attention_head_dim=8, num_layers=2, sample_size=8, out_channels=8)
    model = DiTTransformer2DModel(**sizes, num_embeds_ada_norm=5).eval()
    for block in model.transformer_blocks:
        for parameter in block.parameters():
            torch.nn.init.normal_(parameter, std=0.15)
        block.norm1.emb.load_state_dict(model.transformer_blocks[0].norm1.emb.state_dict())
    for part in (model.proj_out_1, model.proj_out_2):
        torch.nn.init.normal_(part.weight, std=0.15)
    return model


@torch.no_grad()
def output_of(model: Any) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    if "Transformer2DModel" in type(model).__name__:
        x = torch.randn(2, 4, 8, 8, generator=generator)
        return model(x, timestep=torch.tensor([3, 700]), class_labels=torch.tensor([0, 4])).sample  # type: ignore[no-any-return]
    result = model(torch.randn(2, 3, 16, 16, generator=generator))
    return getattr(result, "logits", result)


def saved_and_loaded(model: Any, directory: Path) -> Any:
    if hasattr(model, "save_pretrained"):
        model.save_pretrained(directory)
        return type(model).from_pretrained(directory).eval()
    from moh.models.timm import from_pretrained, save_pretrained

    save_pretrained(model, directory, model_args=VIT)  # which timm does not record before 1.0.31
    return from_pretrained(directory)


@pytest.mark.parametrize("router", ["linear", "query_norm"])
@pytest.mark.parametrize("make", [timm_vit, transformers_vit, diffusers_dit], ids=lambda make: make.__name__)
def test_a_converted_image_or_diffusion_model_has_the_dial_and_keeps_its_setting(
    make: Callable[[], Any], router: str, tmp_path: Path
) -> None:
    dense = make()
    options: dict[str, Any] = dict(shared_heads=1, active_heads=1, router=router)
    if make is diffusers_dit:
        options["router"] = "two_stage" if router == "linear" else router  # those that need no calibration
    else:
        options |= dict(calibration=torch.randn(8, 3, 16, 16), progress=False)
    model = moh.convert(dense, **options)
    expected = output_of(dense)
    assert not torch.allclose(output_of(model), expected, rtol=1e-3)
    with moh.active_heads(model, 1.0):
        torch.testing.assert_close(output_of(model), expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))
    assert moh.set_active_heads(model, [3, 2]) == 0.875
    loaded = saved_and_loaded(model, tmp_path)
    assert [r.config.active_heads for r in moh_routers(loaded)] == [3, 2]
    torch.testing.assert_close(output_of(loaded), output_of(model), rtol=1e-4, atol=1e-6)
    assert moh.set_active_heads(loaded, 1) == 0.5


def test_a_timm_model_is_refused_output_changes() -> None:
    with pytest.raises(ValueError, match=r"shares must be None for a VisionTransformer: only models of transformers"):
        moh.convert(timm_vit(), shared_heads=1, active_heads=1, calibration=torch.randn(4, 3, 16, 16), shares=[0.5])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(shares=[]), "shares must be above 0 and at most 1"),
        (dict(shares=[0.5, 1.5]), "shares must be above 0 and at most 1"),
        (dict(shares=[0.5], router="two_stage"), "shares needs router='linear'"),
        (dict(shares=[0.5], refit_output=True), "refit_output must be False where shares is given"),
        (dict(shares=[0.1]), "shares must be at least 0.250, the share of the shared heads, got 0.1"),
    ],
)
def test_output_changes_that_cannot_be_made_are_refused(
    convert: Callable[..., Any], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        convert(**options)
