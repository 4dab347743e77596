"""Promise: the head load is what a direct count gives, and its table and pictures are written whole or not at all."""

from __future__ import annotations

import csv
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from transformers import AutoModelForCausalLM

from moh import MoHConfig, convert
from moh.inspection import HeadLoad, head_load
from moh.inspection.plots import plot_head_load, plot_losses, save


@pytest.fixture(scope="module")
def blocks() -> torch.Tensor:
    return torch.randint(20, (5, 12), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def model(base_dir: Path, blocks):
    """Different heads in the two layers."""
    dense = AutoModelForCausalLM.from_pretrained(base_dir)
    return convert(dense, shared_heads=1, active_heads=[1, 2], calibration=blocks, progress=False)


@pytest.fixture
def load(model, blocks) -> HeadLoad:
    return head_load(model, blocks, batch_size=2, progress=False)


@torch.no_grad()
def test_the_load_is_the_share_of_tokens_with_a_gate_that_is_not_zero(model, blocks, load) -> None:
    gates: list[torch.Tensor] = []
    handles = [
        layer.self_attn.router.register_forward_hook(lambda module, args, info: gates.append(info.gates))
        for layer in model.model.layers
    ]
    model(blocks)
    for handle in handles:
        handle.remove()
    expected = torch.stack([(g != 0).double().mean((0, 1)) for g in gates])
    assert torch.allclose(load.load, expected, rtol=0, atol=1e-12)
    assert load.load.shape == (2, 4) and load.load.dtype == torch.float64
    assert load.tokens == 60
    assert load.share == pytest.approx([2 / 4, 3 / 4])
    assert load.layers == model.config.layer_configs()
    for layer, config in enumerate(load.layers):
        assert load.load[layer, list(config.shared_indices)].tolist() == [1.0]
        assert load.load[layer].sum() == pytest.approx(1 + config.active_heads)


def test_counting_leaves_the_model_in_its_mode(model, blocks) -> None:
    model.train()
    head_load(model, blocks, progress=False)
    assert model.training


def test_a_dense_model_is_refused(base_dir: Path, blocks) -> None:
    dense = AutoModelForCausalLM.from_pretrained(base_dir).train()
    with pytest.raises(ValueError, match="model has no MoH layers: a dense model uses every head for every token"):
        head_load(dense, blocks, progress=False)
    assert dense.training


@pytest.mark.parametrize("shape", [(0, 8), (8,), (3, 0)], ids=str)
def test_no_blocks_are_refused(model, shape) -> None:
    with pytest.raises(ValueError, match=r"blocks must be token ids \[n, seq_len\] with n >= 1"):
        head_load(model, torch.zeros(shape, dtype=torch.long), progress=False)


def test_the_table_has_a_row_for_each_head_of_each_layer(load, tmp_path: Path) -> None:
    load.save_csv(tmp_path / "load.csv")
    with open(tmp_path / "load.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [(int(r["layer"]), int(r["head"])) for r in rows] == [(i, h) for i in range(2) for h in range(4)]
    for row in rows:
        layer, head = int(row["layer"]), int(row["head"])
        assert float(row["load"]) == float(load.load[layer, head])
        assert row["kind"] == ("shared" if head in load.layers[layer].shared_indices else "routed")
    assert [path.name for path in tmp_path.iterdir()] == ["load.csv"]


def test_files_can_be_read_by_others(load, tmp_path: Path) -> None:
    load.save_csv(tmp_path / "load.csv")
    (tmp_path / "other").write_text("")
    assert (tmp_path / "load.csv").stat().st_mode == (tmp_path / "other").stat().st_mode


def test_a_table_that_cannot_take_its_place_leaves_nothing_behind(load, tmp_path: Path) -> None:
    (tmp_path / "load.csv").mkdir()
    with pytest.raises(OSError):
        load.save_csv(tmp_path / "load.csv")
    assert [path.name for path in tmp_path.iterdir()] == ["load.csv"]


CURVES = {"dense": [(1, 3.0), (2, 2.0)], "MoH": [(1, 3.5)], "none": []}


@pytest.mark.parametrize("suffix", ["png", "svg"])
@pytest.mark.parametrize("kind", ["heads", "losses"])
def test_pictures_are_written_whole_and_nothing_else(load, tmp_path: Path, kind, suffix) -> None:
    figure = plot_head_load(load) if kind == "heads" else plot_losses(CURVES)
    path = tmp_path / f"picture.{suffix}"
    for _ in range(2):  # the second replaces the first
        save(figure, path)
    if suffix == "png":
        assert path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n") and path.read_bytes().endswith(b"IEND\xaeB`\x82")
    else:
        assert ElementTree.parse(path).getroot().tag.endswith("}svg")
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_a_picture_that_cannot_take_its_place_leaves_nothing_behind(load, tmp_path: Path) -> None:
    (tmp_path / "load.png").mkdir()
    with pytest.raises(OSError):
        save(plot_head_load(load), tmp_path / "load.png")
    assert [path.name for path in tmp_path.iterdir()] == ["load.png"]


def test_the_heat_map_shows_the_loads_and_marks_the_shared_heads() -> None:
    load = HeadLoad(torch.tensor([[1.0, 0.25, 0.75]]), [MoHConfig(3, [0], 1, "linear")], 8)
    axes, *_ = plot_head_load(load, title="A title").axes
    assert axes.images[0].get_array().tolist() == load.load.tolist()
    assert [(t.get_text(), t.get_position()) for t in axes.texts] == [("S", (0, 0))]
    assert axes.get_title() == "A title"


def test_each_run_has_its_own_line() -> None:
    (axes,) = plot_losses(CURVES).axes
    lines = axes.get_lines()
    assert [list(zip(*line.get_data(), strict=True)) for line in lines] == list(CURVES.values())
    assert [text.get_text() for text in axes.get_legend().get_texts()] == list(CURVES)
    assert len({(line.get_color(), line.get_linestyle()) for line in lines}) == 3
