"""Promise: the load per class is what a direct count gives, and its picture shows the layers and classes asked for."""

from __future__ import annotations

import csv
from pathlib import Path
from xml.etree import ElementTree

import pytest
import timm
import torch

import moh
from moh import MoHConfig
from moh.inspection import ClassHeadLoad, class_head_load
from moh.inspection.class_plots import MAX_CLASSES, MAX_LAYERS, plot_class_load
from moh.inspection.plots import plot_head_load, save
from moh.models.image_loading import ImageInput
from moh.training.images.sources import TensorImages

CLASSES = ("ant", "bee", "cow")
SEEN = ImageInput((1, 8, 8), (0.5,), (0.25,))
TINY = dict(img_size=8, patch_size=4, in_chans=1, embed_dim=16, depth=2, num_heads=4)


@pytest.fixture
def model() -> torch.nn.Module:
    heads = dict(shared_heads=1, active_heads=[1, 2])
    made = timm.create_model("moh_vit", base="vit_tiny_patch16_224", num_classes=3, **heads, **TINY)
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return made


@pytest.fixture
def images() -> TensorImages:
    labels = torch.tensor([0, 0, 0, 1, 1, 0, 1])  # no cow
    return TensorImages(torch.randint(0, 256, (7, 1, 8, 8), dtype=torch.uint8), labels, CLASSES)


@pytest.fixture
def load(model, images) -> ClassHeadLoad:
    return class_head_load(model, images, wanted=SEEN, batch_size=3, progress=False)


def fake(classes: int, layers: list[MoHConfig]) -> ClassHeadLoad:
    generator = torch.Generator().manual_seed(0)
    loads = [torch.rand(classes, config.num_heads, generator=generator, dtype=torch.float64) for config in layers]
    names = tuple(f"class {number}" for number in range(classes))
    return ClassHeadLoad(names, loads, layers, torch.ones(classes, dtype=torch.int64), tokens=100)


@torch.no_grad()
def test_the_load_is_the_share_of_the_classs_tokens_that_use_the_head(model, images, load) -> None:
    with moh.record_routing(model.eval()) as routing:
        model((images.pixels.float() / 255 - 0.5) / 0.25)
    for layer, (_, info) in enumerate(routing):
        active = (info.gates != 0).double()  # [B, N, H]
        for label in (0, 1):
            expected = active[images.labels == label].mean((0, 1))
            torch.testing.assert_close(load.load[layer][label], expected, rtol=0, atol=1e-12)
        assert load.layers[layer] == info.config
        assert load.load[layer][2].isnan().all()
        torch.testing.assert_close(load.mean().load[layer], load.load[layer][:2].mean(0))
    assert load.images.tolist() == [4, 3, 0] and load.tokens == 7 * 5
    assert load.mean().share == pytest.approx([2 / 4, 3 / 4])
    assert (load.load[0][:2] - load.load[0][0]).abs().max() > 0  # the classes differ


def test_the_table_has_a_row_for_each_class_with_images_layer_and_head(load, tmp_path: Path) -> None:
    load.save_csv(tmp_path / "load.csv")
    with open(tmp_path / "load.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [(r["class"], int(r["layer"]), int(r["head"])) for r in rows] == [
        (name, layer, head) for name in ("ant", "bee") for layer in range(2) for head in range(4)
    ]
    for row in rows:
        layer, head = int(row["layer"]), int(row["head"])
        assert float(row["load"]) == float(load.load[layer][CLASSES.index(row["class"]), head])
        assert row["kind"] == ("shared" if head == 0 else "routed")


def test_a_dense_model_and_other_classes_are_refused(images) -> None:
    dense = timm.create_model("vit_tiny_patch16_224", num_classes=3, **TINY)
    with pytest.raises(ValueError, match="model has no MoH layers"):
        class_head_load(dense, images, wanted=SEEN, progress=False)
    with pytest.raises(ValueError, match="the images must have the 4 classes of the model, but have 3"):
        class_head_load(timm.create_model("vit_tiny_patch16_224", num_classes=4, **TINY), images, wanted=SEEN)


def test_counting_leaves_the_model_in_its_mode(model, images) -> None:
    class_head_load(model.train(), images, wanted=SEEN, progress=False)
    assert model.training


def test_layers_may_differ_in_their_heads() -> None:
    load = fake(2, [MoHConfig(2, 1, 1), MoHConfig(4, 1, 2)])
    mean = load.mean()
    assert mean.load.shape == (2, 4) and mean.load[0, 2:].isnan().all()
    assert mean.share == pytest.approx([load.load[0].mean().item(), load.load[1].mean().item()])
    assert len(mean.rows()) == 6
    assert plot_head_load(mean).axes[0].images[0].get_array().mask.sum() == 2  # blank where there is no head


def test_the_most_distinctive_classes_are_those_far_from_the_mean() -> None:
    load = fake(4, [MoHConfig(3, 1, 1)])
    load.load[0][:] = 0.5
    load.load[0][2, 1], load.load[0][3, 2] = 0.9, 0.0
    assert load.distinctive(1) == ("class 3",) and load.distinctive(2) == ("class 2", "class 3")
    assert load.distinctive(9) == load.classes


def test_each_panel_shows_a_layers_loads_with_classes_and_marked_shared_heads(load) -> None:
    figure = plot_class_load(load, classes=["bee", "ant"])
    panels = [axes for axes in figure.axes if axes.get_title().startswith("layer")]
    assert [axes.get_title() for axes in panels] == ["layer 0", "layer 1"]
    for layer, axes in enumerate(panels):
        assert axes.images[0].get_array().tolist() == load.load[layer][[1, 0]].tolist()
        assert [label.get_text() for label in axes.get_xticklabels()] == ["S", "1", "2", "3"]
    assert [label.get_text() for label in panels[0].get_yticklabels()] == ["bee", "ant"]


def test_of_many_classes_and_layers_some_are_shown_and_the_title_says_so() -> None:
    load = fake(40, [MoHConfig(4, 4, 0), *[MoHConfig(4, 1, 1)] * 30])
    figure = plot_class_load(load)
    panels = [axes for axes in figure.axes if axes.get_title().startswith("layer")]
    assert len(panels) == MAX_LAYERS and panels[0].images[0].get_array().shape == (MAX_CLASSES, 4)
    assert (panels[0].get_title(), panels[-1].get_title()) == ("layer 1", "layer 30")  # layer 0 routes nothing
    assert f"{MAX_CLASSES} of 40 classes, {MAX_LAYERS} of 31 layers" in figure.get_suptitle()
    asked = plot_class_load(load, classes=load.classes, layers=[0, 5], title="Mine")
    assert asked.axes[0].images[0].get_array().shape == (40, 4) and asked.get_suptitle() == "Mine"


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"classes": ["yak"]}, "classes must be among those of the model, got 'yak'"),
        ({"layers": [2]}, "layers must be between 0 and 1, got 2"),
        ({"layers": []}, "layers must name at least one layer, got none"),
        ({"classes": []}, "classes must name at least one class, got none"),
    ],
    ids=str,
)
def test_what_is_not_there_cannot_be_shown(load, asked, message) -> None:
    with pytest.raises(ValueError, match=message):
        plot_class_load(load, **asked)


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_the_picture_is_written(load, tmp_path: Path, suffix) -> None:
    path = tmp_path / f"load.{suffix}"
    save(plot_class_load(load), path)
    if suffix == "png":
        assert path.read_bytes().startswith(b"\x89PNG")
    else:
        assert ElementTree.parse(path).getroot().tag.endswith("}svg")
