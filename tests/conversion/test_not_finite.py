"""Promise: a model that holds NaN or computes it is refused, with its layer and the way out, whatever it is converted to."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from moh import convert
from moh.conversion.dense import check_weights

OPTIONS = [
    pytest.param(dict(router="linear"), id="linear"),
    pytest.param(dict(router="linear", allocation="even", refit_output=False), id="linear-even"),
    pytest.param(dict(router="linear", allocation="even", shares=[0.75]), id="linear-even-shares"),
    pytest.param(dict(router="two_stage"), id="two_stage"),
    pytest.param(dict(router="single_stage"), id="single_stage"),
]
HEADS = dict(shared_heads=1, active_heads=1, progress=False)


@pytest.mark.parametrize("family", ["Llama", "Qwen3"])
@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("options", OPTIONS)
def test_a_float16_model_whose_mlp_overflows(make_dense, tokens, family: str, layer: int, options) -> None:
    dense = make_dense(family).half()
    with torch.no_grad():
        dense.model.layers[layer].mlp.down_proj.weight.fill_(6e4)
    with pytest.raises(ValueError, match=rf"layer {layer} gives .*NaN or infinity .*torch.float16: .*float32"):
        convert(dense, calibration=tokens, **HEADS, **options)
    dense.float()  # the way out
    assert all(p.isfinite().all() for p in convert(dense, calibration=tokens, **HEADS, **options).parameters())


@pytest.mark.parametrize("options", [*OPTIONS, pytest.param(dict(router="query_norm"), id="query_norm")])
def test_a_weight_that_is_not_finite(make_dense, tokens, options) -> None:
    dense = make_dense()
    with torch.no_grad():
        dense.model.layers[1].mlp.up_proj.weight[3, 2] = torch.nan
    with pytest.raises(ValueError, match=r"layer 1 \(model.layers.1.mlp.up_proj.weight\) .*NaN or infinity.*float32"):
        convert(dense, calibration=tokens, **HEADS, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf], ids=str)
def test_every_kind_of_weight_that_is_not_finite_is_found(dtype: torch.dtype, value: float) -> None:
    part = nn.Linear(4, 3, dtype=dtype)
    part.empty = nn.Parameter(torch.empty(0, dtype=dtype))
    check_weights(part)
    with torch.no_grad():
        part.weight[1, 2] = value
    with pytest.raises(ValueError, match="weight of the model holds NaN or infinity"):
        check_weights(part)


def test_a_loss_and_gradients_that_overflow(make_dense, tokens, monkeypatch) -> None:
    from moh.conversion.transformers import DenseTextModel

    dense, loss = make_dense(), DenseTextModel.loss
    for factor, message in ((torch.inf, "the loss, behind layer 1, is NaN or infinity"), (1e39, "is NaN")):
        monkeypatch.setattr(DenseTextModel, "loss", lambda m, s, factor=factor: loss(m, s) * factor)
        with pytest.raises(ValueError, match=message):
            convert(dense, calibration=tokens, **HEADS)

    class Overflow(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx, gradient: Tensor) -> Tensor:
            return gradient * torch.inf

    monkeypatch.setattr(DenseTextModel, "loss", lambda m, s: Overflow.apply(loss(m, s)))
    with pytest.raises(ValueError, match="layer 1 has gradients of NaN or infinity"):
        convert(dense, calibration=tokens, **HEADS)


@pytest.mark.parametrize(
    ("router", "allocation"), [("linear", "even"), ("linear", "sensitivity"), ("two_stage", "even")]
)
def test_an_image_model_that_overflows(router: str, allocation: str) -> None:
    timm = pytest.importorskip("timm", reason="the vision extra is not installed")
    sizes = dict(embed_dim=16, num_heads=4, depth=2, img_size=32, patch_size=16, num_classes=3)
    dense = timm.models.VisionTransformer(**sizes).half().eval()
    images = torch.randn(2, 3, 32, 32)
    options = dict(**HEADS, calibration=images, router=router, allocation=allocation)
    nn.init.constant_(dense.blocks[1].mlp.fc1.bias, 100)
    nn.init.constant_(dense.blocks[1].mlp.fc2.weight, 6e4)
    with pytest.raises(ValueError, match=r"layer 1 gives NaN or infinity .*torch.float16: .*float32"):
        convert(dense, **options)
    dense.head.weight.data[0, 0] = torch.inf
    with pytest.raises(ValueError, match=r"head.weight of the model holds NaN or infinity.*float32"):
        convert(dense, **options)


def test_a_diffusion_model_that_is_damaged() -> None:
    diffusers = pytest.importorskip("diffusers", reason="the diffusion extra is not installed")
    sizes = dict(num_attention_heads=4, attention_head_dim=8, num_layers=2, sample_size=4, in_channels=4)
    dense = diffusers.DiTTransformer2DModel(**sizes, num_embeds_ada_norm=5, out_channels=8)
    with torch.no_grad():
        dense.transformer_blocks[1].attn1.to_q.weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"layer 1 \(transformer_blocks.1.attn1.to_q.weight\).*float32"):
        convert(dense, **HEADS, router="two_stage")
