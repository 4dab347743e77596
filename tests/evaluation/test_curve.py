"""The trade-off curve: what it measures at each share of heads, and the command that draws it."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import torch

import moh
from moh.cli import main
from moh.evaluation import perplexity
from moh.evaluation.curve import dial_shares, image_curve, text_curve
from moh.evaluation.curve_plots import plot_curve
from moh.models.dial import moh_routers

SIZES = dict(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
)


@pytest.fixture
def model() -> Any:
    from moh.models.transformers import MoHLlamaConfig, MoHLlamaForCausalLM

    heads = dict(router="linear", shared_heads=1, active_heads=1)
    return MoHLlamaForCausalLM(MoHLlamaConfig(**SIZES, **heads)).eval()


def dense_model(**options: Any) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(**SIZES | options)).eval()


BLOCKS = torch.randint(64, (3, 16), generator=torch.Generator().manual_seed(3))


def test_every_point_is_the_model_at_that_share(model: Any) -> None:
    curve = text_curve(model, BLOCKS, repeats=0)
    assert [p.share for p in curve.points] == [0.25, 0.5, 0.75, 1.0]
    assert [p.active_heads for p in curve.points] == [(0, 0), (1, 1), (2, 2), (3, 3)]
    for point in curve.points:
        with moh.active_heads(model, list(point.active_heads)):
            assert point.perplexity == perplexity(model, BLOCKS).perplexity
    assert len({p.perplexity for p in curve.points}) == 4
    assert [r.config.active_heads for r in moh_routers(model)] == [1, 1], "the model is left as it was"


def test_speeds_are_measured_at_the_share_of_their_point(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from moh.evaluation import speed

    def timed(model: Any, prompt: Any, decode_tokens: int) -> tuple[float, float]:
        return 1.0 + getattr(model.config, "share", 3.0), 1.0

    monkeypatch.setattr(speed, "_time_once", timed)
    sizes = dict(prompt_tokens=8, decode_tokens=2, repeats=2)
    curve = text_curve(model, BLOCKS, dense=dense_model(), shares=[1.0, 0.5], **sizes)
    assert [p.prefill.median for p in curve.points if p.prefill] == [8 / 1.5, 8 / 2.0]
    assert [p.decode.median for p in curve.points if p.decode] == [2.0, 2.0]
    assert curve.dense is not None and curve.dense.prefill is not None and curve.dense.prefill.median == 8 / 4.0
    assert model.config.active_heads == 1


def test_a_dense_model_stands_beside_the_points(model: Any) -> None:
    dense = dense_model()
    curve = text_curve(model, BLOCKS, dense=dense, shares=[0.5, 1.0], repeats=0)
    assert [p.share for p in curve.points] == [0.5, 1.0]
    assert curve.dense is not None and curve.dense.perplexity == perplexity(dense, BLOCKS).perplexity
    assert [row["active_heads"] for row in curve.rows()] == ["1 1", "3 3", "dense"]
    assert curve.as_dict()["dense"]["perplexity"] == curve.dense.perplexity


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: dense_model(vocab_size=65), "vocabulary of 64 tokens, got one of 65"),
        (lambda: dense_model().bfloat16(), "dtype and device, torch.float32 on cpu, got torch.bfloat16 on cpu"),
        (None, "dense must be a model of dense attention, got a MoHLlamaForCausalLM with MoH layers"),
    ],
    ids=["vocabulary", "dtype", "MoH"],
)
def test_a_dense_model_that_does_not_fit_is_refused_before_anything_is_measured(
    model: Any, make: Any, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moh.evaluation.curve.perplexity", lambda *_, **__: pytest.fail("measured"))
    with pytest.raises(ValueError, match=message):
        text_curve(model, BLOCKS, dense=make() if make else model)


@pytest.mark.parametrize("with_dense", [True, False], ids=["dense", "alone"])
def test_the_dense_model_is_a_horizontal_line_in_both_pictures(model: Any, with_dense: bool) -> None:
    dense = dense_model() if with_dense else None
    sizes = dict(prompt_tokens=8, decode_tokens=2, repeats=1, shares=[0.5, 1.0])
    curve = text_curve(model, BLOCKS, dense=dense, **sizes)
    flat = [
        [line.get_ydata()[0] for line in axis.lines if list(line.get_xdata()) == [0, 1]]  # across the whole figure
        for axis in plot_curve(curve).axes
    ]
    assert flat == ([[curve.dense.perplexity], [1]] if curve.dense else [[], []])
    medians = [list(bars[0].get_ydata()) for bars in plot_curve(curve).axes[1].containers]
    base = curve.dense or curve.points[-1]
    for name, drawn in zip(("prefill", "decode"), medians, strict=True):
        rates = [getattr(point, name).median for point in curve.points]
        assert drawn == [rate / getattr(base, name).median for rate in rates]


@pytest.fixture
def images() -> Any:
    from moh.data.images.sources import TensorImages

    pixels = torch.randint(0, 256, (60, 3, 8, 8), dtype=torch.uint8)
    return TensorImages(pixels, torch.arange(60) % 3, ("ant", "bee", "cow"))


def classifier(name: str = "moh_vit", **options: Any) -> Any:
    import timm

    from moh.data.images.recipe import ImageInput
    from moh.models.timm.loading import describe

    tiny = dict(img_size=8, patch_size=4, embed_dim=16, depth=2, num_heads=4, num_classes=3)
    made = timm.create_model(name, **tiny, **options).eval()
    for parameter in made.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.5)
    describe(made, ImageInput((3, 8, 8), (0.5,) * 3, (0.25,) * 3), ("ant", "bee", "cow"))
    return made


def test_every_point_of_an_image_model_is_the_model_at_that_share(images: Any) -> None:
    pytest.importorskip("timm")
    from moh.evaluation import evaluate_images

    base = "vit_tiny_patch16_224"
    model = classifier(base=base, shared_heads=1, active_heads=1, router="linear")
    dense = classifier(base)
    curve = image_curve(model, images, dense=dense, batch_size=32)
    assert [p.share for p in curve.points] == [0.25, 0.5, 0.75, 1.0]
    assert [p.active_heads for p in curve.points] == [(0, 0), (1, 1), (2, 2), (3, 3)]
    for point in curve.points:
        with moh.active_heads(model, list(point.active_heads)):
            assert point.top1 == evaluate_images(model, images, batch_size=32).top1
        assert point.images is not None and point.images > 0
    assert curve.dense is not None and curve.dense.top1 == evaluate_images(dense, images, batch_size=32).top1
    assert len({p.top1 for p in curve.points}) > 1
    assert [r.config.active_heads for r in moh_routers(model)] == [1, 1], "the model is left as it was"
    quality, speed = plot_curve(curve).axes
    assert list(quality.lines[0].get_ydata()) == [p.top1 for p in curve.points]
    assert quality.lines[1].get_ydata()[0] == curve.dense.top1
    drawn = list(speed.containers[0][0].get_ydata())
    assert drawn == [p.images / curve.dense.images for p in curve.points]


def test_an_image_model_without_classes_is_refused(images: Any) -> None:
    from transformers import ViTConfig, ViTModel

    sizes = dict(image_size=8, patch_size=4, hidden_size=16, num_attention_heads=2, intermediate_size=16)
    model = ViTModel(ViTConfig(**sizes, num_hidden_layers=1))
    with pytest.raises(ValueError, match="model must be an image classifier of timm or transformers, got a ViTModel"):
        image_curve(model, images)


def test_shares_go_from_the_fewest_heads_to_all_in_at_most_nine_steps(model: Any) -> None:
    assert dial_shares(model) == [0.25, 0.5, 0.75, 1.0]
    assert dial_shares(model, points=2) == [0.25, 1.0]
    assert dial_shares(model, points=1) == [1.0]
    wide = torch.nn.Sequential(moh.MoHAttention(64, 32, shared_heads=8, active_heads=8, router="linear"))
    assert dial_shares(wide) == [0.25 + 0.75 * i / 8 for i in range(9)]
    with pytest.raises(ValueError, match="points must be at least 1, got 0"):
        dial_shares(model, points=0)


@pytest.mark.parametrize(("shares", "message"), [([], "at least one share"), ([0.5, 1.2], "at most 1, got 1.2")])
def test_shares_out_of_range_are_refused_before_anything_is_measured(
    model: Any, shares: list[float], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moh.evaluation.curve.perplexity", lambda *_, **__: pytest.fail("measured"))
    with pytest.raises(ValueError, match=message):
        text_curve(model, BLOCKS, shares=shares)


def test_one_command_writes_picture_table_and_json(base_dir: Path, text_file: Path, tmp_path: Path) -> None:
    target, out = tmp_path / "model", tmp_path / "curve"
    options = ["--shared-heads", "1", "--active-heads", "1", "--files", str(text_file), "--calibration-tokens", "512"]
    assert main(["convert", str(base_dir), str(target), *options]) == 0
    sizes = ["--seq-len", "16", "--max-tokens", "64", "--prompt-tokens", "8", "--decode-tokens", "2", "--repeats", "2"]
    dense = ["--dense", str(base_dir)]
    assert main(["curve", str(target), "--output", str(out), "--files", str(text_file), *dense, *sizes]) == 0
    assert (out / "curve.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (out / "curve.svg").read_text(encoding="utf-8")
    rows = list(csv.DictReader((out / "curve.csv").read_text(encoding="utf-8").splitlines()))
    assert [float(row["share"]) for row in rows] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert rows[-1]["active_heads"] == "dense"
    data = json.loads((out / "curve.json").read_text(encoding="utf-8"))
    assert [p["perplexity"] for p in [*data["points"], data["dense"]]] == [float(row["perplexity"]) for row in rows]
    assert all(float(row["decode_per_second"]) > 0 for row in rows)


def test_a_dense_model_has_no_curve(base_dir: Path, text_file: Path, tmp_path: Path, capsys: Any) -> None:
    assert main(["curve", str(base_dir), "--output", str(tmp_path), "--files", str(text_file), "--seq-len", "16"]) == 2
    assert "moh.convert makes a MoH model of it" in capsys.readouterr().err
