"""Promises on sizes: any image that the strides allow, positions for the image's size, clear errors."""

from __future__ import annotations

import copy

import pytest
import torch

pytest.importorskip("timm", reason="the vision extra is not installed")

from transnext_cases import tiny_model

from moh.models.timm.transnext import Architecture, MoHTransNeXt
from moh.models.timm.transnext.architecture import PositionBias, visible_neighbours


@pytest.mark.parametrize("size", [(32, 32), (8, 8), (16, 40), (64, 24)], ids=lambda s: f"{s[0]}x{s[1]}")
@torch.no_grad()
def test_other_sizes_than_trained_on_work(size):
    model = tiny_model()
    assert model.forward_features(torch.randn(1, 3, *size)).shape == (1, 32, size[0] // 8, size[1] // 8)
    assert torch.isfinite(model(torch.randn(2, 3, *size))).all()


@pytest.mark.parametrize("size", [(30, 32), (32, 4), (0, 32), (33, 33)], ids=lambda s: f"{s[0]}x{s[1]}")
def test_a_size_that_the_strides_do_not_divide_is_refused(size):
    with pytest.raises(ValueError, match=rf"multiples of 8 .* got {size[0]} x {size[1]}"):
        tiny_model()(torch.randn(1, 3, *size))


def test_other_channels_and_ranks_are_refused():
    with pytest.raises(ValueError, match=r"in_chans = 3, H, W\], got \(1, 1, 32, 32\)"):
        tiny_model()(torch.randn(1, 1, 32, 32))
    with pytest.raises(ValueError, match="x must have shape"):
        tiny_model()(torch.randn(3, 32, 32))


def bias(**options) -> PositionBias:
    torch.manual_seed(0)
    return PositionBias(3, **dict(ratio=2, trained_size=(8, 8)) | options)


@pytest.mark.parametrize("size", [(4, 4), (8, 6), (2, 10)], ids=lambda s: f"{s[0]}x{s[1]}")
@pytest.mark.parametrize("ratio", [1, 2])
@torch.no_grad()
def test_bias_is_the_network_of_each_pairs_own_offset(size, ratio):
    module = bias(ratio=ratio)
    got = module(size)
    height, width = size
    keys = [(a, b) for a in range(height // ratio) for b in range(width // ratio)]
    centre = (ratio - 1) / 2
    for n, (i, j) in enumerate((i, j) for i in range(height) for j in range(width)):
        offset = torch.tensor([(i - ratio * a - centre, j - ratio * b - centre) for a, b in keys]) * 8 / 7
        coordinates = offset.sign() * (1 + offset.abs()).log2() / 3
        expected = module.fc2(module.fc1(coordinates).relu())  # [P, H]
        torch.testing.assert_close(got[:, n], expected.T, rtol=0, atol=1e-5)


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "plain"])
@pytest.mark.parametrize("training", [True, False], ids=["train_and_eval", "always_eval"])
def test_kept_bias_follows_an_optimiser(fused: bool, training: bool):
    module = bias().eval()
    optimiser = torch.optim.AdamW(module.parameters(), lr=0.1, fused=fused)
    with torch.no_grad():
        before = module((8, 8)).clone()
    module.train(training)
    module((8, 8)).square().mean().backward()
    optimiser.step()
    with torch.no_grad():
        after = module.eval()((8, 8))
        assert not torch.allclose(before, after, atol=1e-3)
        assert torch.equal(after, copy.deepcopy(module)._compute((8, 8)))


@torch.no_grad()
def test_kept_bias_follows_the_size_and_the_weights():
    module = bias().eval()
    first = module((8, 8))
    assert module((8, 8)) is first  # kept
    assert module((4, 4)).shape == (3, 16, 4)
    assert torch.equal(module((8, 8)), first)
    module.fc2.bias.add_(1)
    assert torch.allclose(module((8, 8)), first + 1)
    module.load_state_dict(bias().state_dict())
    assert torch.equal(module((8, 8)), first)
    assert module.double()((8, 8)).dtype == torch.float64
    assert torch.allclose(module.float()((8, 8)), first)
    assert set(module.state_dict()) == {"fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias"}
    assert torch.equal(copy.deepcopy(module)((8, 8)), first)


def test_bias_is_computed_anew_with_gradients_and_in_training():
    module = bias().eval()
    with torch.no_grad():
        kept = module((8, 8))
    module((8, 8)).sum().backward()
    assert module.fc1.weight.grad is not None
    module.train()
    with torch.no_grad():
        assert module((8, 8)) is not kept
        module.fc2.bias.data.add_(1)
        assert torch.allclose(module((8, 8)), kept + 1)


def test_window_counts_only_tokens_inside_the_image():
    counts = visible_neighbours((3, 4), 3, torch.device("cpu")).view(3, 4)
    assert counts.tolist() == [[4, 6, 6, 4], [6, 9, 9, 6], [4, 6, 6, 4]]
    assert visible_neighbours((1, 1), 5, torch.device("cpu")).tolist() == [1]


SIZES = dict(embed_dims=(8, 16), num_heads=(2, 4), depths=(1, 1), mlp_ratios=(2, 2), sr_ratios=(2, 1), img_size=32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(num_heads=(2,)), r"num_heads must have one entry for each of embed_dims' 2 stages, got \[2\]"),
        (dict(num_heads=(3, 4)), "embed_dims must be multiples of num_heads, got 8 for 3 heads"),
        (dict(depths=(1, 0)), r"depths must be at least 1 everywhere, got \[1, 0\]"),
        (dict(shared_heads=(1, 1)), "shared_heads and active_heads must both be given"),
        (dict(shared_heads=(1, 1), active_heads=(1, 4)), "active_heads must be between 0 and .* = 3, got 4"),
        (dict(window_size=2), "window_size must be odd and at least 1, got 2"),
        (dict(patch_size=0), "patch_size must be at least 1, got 0"),
        (dict(img_size=36), "img_size: height and width must be multiples of 8 .*, got 36 x 36"),
        (dict(img_size=(32, 32, 3)), r"img_size must be one number or height and width, got \[32, 32, 3\]"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_sizes_that_do_not_fit_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        Architecture(**SIZES | change)


def test_an_unknown_pool_or_rate_is_named():
    with pytest.raises(ValueError, match="global_pool must be one of 'avg', '', got 'max'"):
        MoHTransNeXt(**SIZES, global_pool="max")
    with pytest.raises(ValueError, match=r"attn_drop_rate must be at least 0 and below 1, got 1\.0"):
        MoHTransNeXt(**SIZES, attn_drop_rate=1.0)
