"""Promise: the figures show the numbers, name what was left out, and are written whole with their data or not at all."""

from __future__ import annotations

import csv
import dataclasses
import json
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from group_cases import made_up, random_use

from moh import MoHConfig
from moh.inspection import permutation_test
from moh.inspection.group_plots import (
    MAX_GROUPS,
    MAX_LAYERS,
    plot_distances,
    plot_group_load,
    plot_shared_and_routed,
    shared_and_routed_rows,
)
from moh.inspection.plots import (
    find_history,
    plot_head_load,
    plot_losses,
    plot_training,
    save,
    save_with_data,
    training_rows,
)

CURVES = {"dense": [(1, 3.0), (2, 2.0)], "MoH": [(1, 3.5)], "none": []}
ROUTED = MoHConfig(4, 1, 1)
HISTORY = [
    {"step": 1, "loss": 3.0, "balance_loss": 1.5, "active_share": 0.5, "routed_load": [[], [0.2, 0.8]]},
    {"step": 1, "eval_loss": 3.0},
    {"step": 2, "loss": 2.0, "balance_loss": 1.2, "active_share": 0.5, "routed_load": [[], [0.4, 0.6]]},
]


def is_picture(path: Path) -> bool:
    if path.suffix == ".png":
        return path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n") and path.read_bytes().endswith(b"IEND\xaeB`\x82")
    return ElementTree.parse(path).getroot().tag.endswith("}svg")


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_pictures_are_written_whole_and_nothing_else(tmp_path: Path, suffix) -> None:
    path = tmp_path / f"picture.{suffix}"
    for _ in range(2):  # the second replaces the first
        save(plot_losses(CURVES), path)
    assert is_picture(path) and [p.name for p in tmp_path.iterdir()] == [path.name]


def test_a_figure_has_its_data_beside_it(tmp_path: Path) -> None:
    rows = [{"layer": 0, "load": 0.5}]
    save_with_data(plot_losses(CURVES), rows, tmp_path / "v1.0 load")
    assert {path.name for path in tmp_path.iterdir()} == {f"v1.0 load.{suffix}" for suffix in ("png", "svg", "csv")}
    assert all(is_picture(tmp_path / f"v1.0 load.{suffix}") for suffix in ("png", "svg"))
    with open(tmp_path / "v1.0 load.csv", newline="") as file:
        assert list(csv.DictReader(file)) == [{"layer": "0", "load": "0.5"}]


def test_a_picture_that_cannot_take_its_place_leaves_nothing_behind(tmp_path: Path) -> None:
    (tmp_path / "load.png").mkdir()
    with pytest.raises(OSError):
        save(plot_losses(CURVES), tmp_path / "load.png")
    assert [path.name for path in tmp_path.iterdir()] == ["load.png"]


def test_the_heat_map_shows_the_loads_and_marks_shared_and_dense_heads() -> None:
    load = torch.tensor([[1.0, 0.25, 0.75], [1.0, 1.0, torch.nan]])
    axes, bar = plot_head_load(load, [MoHConfig(3, [0], 1, "linear"), None], title="A title").axes
    shown = axes.images[0].get_array()
    assert shown[0].tolist() == load[0].tolist() and shown.mask.sum() == 1  # blank where there is no head
    marks = [(t.get_text(), t.get_position()) for t in axes.texts]
    assert marks == [("S", (0, 0)), ("D", (0, 1)), ("D", (1, 1))]
    assert axes.get_title() == "A title" and "D: dense layer" in bar.get_ylabel()


def test_each_run_has_its_own_line() -> None:
    (axes,) = plot_losses(CURVES).axes
    lines = axes.get_lines()
    assert [list(zip(*line.get_data(), strict=True)) for line in lines] == list(CURVES.values())
    assert [text.get_text() for text in axes.get_legend().get_texts()] == list(CURVES)
    assert len({(line.get_color(), line.get_linestyle()) for line in lines}) == 3


def test_each_panel_shows_a_layers_loads_with_groups_and_marked_heads() -> None:
    use = random_use(3, [ROUTED, None])
    figure = plot_group_load(use, groups=["group 2", "group 0"], layers=[0, 1])
    panels = [axes for axes in figure.axes if axes.get_title().startswith("layer")]
    assert [axes.get_title() for axes in panels] == ["layer 0", "layer 1"]
    for layer, axes in enumerate(panels):
        assert axes.images[0].get_array().tolist() == use.load[layer][[2, 0]].tolist()
        expected = ["S", "1", "2", "3"] if layer == 0 else ["D"] * 4
        assert [label.get_text() for label in axes.get_xticklabels()] == expected
    assert [label.get_text() for label in panels[0].get_yticklabels()] == ["group 2", "group 0"]
    assert "2 of 3 groups" in figure.get_suptitle() and "D: dense layer" in figure.get_suptitle()


def test_scores_have_panels_of_their_own_and_one_scale() -> None:
    use = dataclasses.replace(
        random_use(2, [ROUTED, ROUTED]), gate=[torch.full((2, 4), v).double() for v in (0.5, 2.5)]
    )
    figure = plot_group_load(use, quantity="gate")
    shown = [axes.images[0] for axes in figure.axes if axes.get_title().startswith("layer")]
    assert [image.get_array().max() for image in shown] == [0.5, 2.5]
    assert {image.get_clim() for image in shown} == {(0.0, 2.5)}
    assert figure.get_suptitle() == "Routing score per group (S: shared)"


def test_of_many_groups_and_layers_some_are_shown_and_the_title_says_so() -> None:
    use = random_use(40, [MoHConfig(4, 4, 0), *[ROUTED] * 30])
    figure = plot_group_load(use)
    panels = [axes for axes in figure.axes if axes.get_title().startswith("layer")]
    assert len(panels) == MAX_LAYERS and panels[0].images[0].get_array().shape == (MAX_GROUPS, 4)
    assert (panels[0].get_title(), panels[-1].get_title()) == ("layer 1", "layer 30")  # layer 0 routes nothing
    assert f"{MAX_GROUPS} of 40 groups, {MAX_LAYERS} of 31 layers" in figure.get_suptitle()
    asked = plot_group_load(use, groups=use.groups, layers=[0, 5], title="Mine")
    assert asked.axes[0].images[0].get_array().shape == (40, 4) and asked.get_suptitle() == "Mine"


def test_the_most_distinctive_groups_are_those_far_from_the_mean() -> None:
    use = made_up({name: [[0.5, 0.5]] for name in "abcd"})
    use.load[0][2, 1], use.load[0][3, 2] = 0.9, 0.0
    assert use.distinctive(1) == ("d",) and use.distinctive(2) == ("c", "d")
    assert use.distinctive(9) == use.groups


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"groups": ["yak"]}, "groups must be among group 0, group 1, got 'yak'"),
        ({"layers": [2]}, "layers must be between 0 and 0, got 2"),
        ({"layers": []}, "layers must name at least one layer, got none"),
        ({"groups": []}, "groups must name at least one group, got none"),
    ],
    ids=str,
)
def test_what_is_not_there_cannot_be_shown(asked, message) -> None:
    with pytest.raises(ValueError, match=message):
        plot_group_load(random_use(2, [ROUTED]), **asked)


def test_shared_and_routed_heads_are_compared_where_they_are_active() -> None:
    use = made_up({"a": [[0.6, 0.2]], "b": [[0.2, 0.6]]})  # contributions equal to the loads
    shared, routed = shared_and_routed_rows(use)
    assert (shared["kind"], shared["heads"], shared["load"], shared["contribution"]) == ("shared", 1, 1.0, 1.0)
    assert (routed["kind"], routed["heads"]) == ("routed", 2)
    assert routed["load"] == pytest.approx(0.4) and routed["contribution"] == pytest.approx(1)
    assert shared["part"] == pytest.approx(1 / 1.8) and routed["part"] == pytest.approx(0.8 / 1.8)
    left, right = plot_shared_and_routed([shared, routed]).axes
    assert [list(line.get_ydata()) for line in right.get_lines()] == [[shared["part"]], [routed["part"]]]
    assert [text.get_text() for text in left.get_legend().get_texts()] == ["shared", "routed"]
    assert shared_and_routed_rows(random_use(1, [None]))[0]["kind"] == "dense"


def test_distances_are_shown_with_what_chance_gives() -> None:
    use = random_use(3, [ROUTED, None, ROUTED])
    tests = permutation_test(use, permutations=9)
    matrix, panel, *_ = plot_distances(use, tests).axes
    shown = matrix.images[0].get_array()
    assert shown.shape == (3, 3) and shown[0, 0] == 0 and shown[0, 1] == shown[1, 0] > 0
    assert [list(line.get_xdata()) for line in panel.get_lines()[:2]] == [[0, 2]] * 2
    assert list(panel.get_lines()[0].get_ydata()) == [row["divergence"] for row in tests[:-1]]
    for other in (random_use(1, [ROUTED]), random_use(3, [None])):
        with pytest.raises(ValueError, match="distances need at least two groups with inputs"):
            plot_distances(other)


def test_training_is_shown_from_what_the_trainer_logged(tmp_path: Path) -> None:
    rows = training_rows(HISTORY)
    assert [(row["step"], row["layer"], row["lowest"], row["highest"]) for row in rows] == [
        (1, "all", 0.2, 0.8), (1, 1, 0.2, 0.8), (2, "all", 0.4, 0.6), (2, 1, 0.4, 0.6)
    ]  # fmt: skip
    balance, loads = plot_training(rows).axes
    assert list(balance.get_lines()[0].get_ydata()) == [1.5, 1.2]
    assert [list(line.get_ydata()) for line in loads.get_lines()] == [[0.8, 0.6], [0.2, 0.4]]
    older = training_rows([{key: value for key, value in entry.items() if key != "routed_load"} for entry in HISTORY])
    assert len(plot_training(older).axes) == 1
    with pytest.raises(ValueError, match="the log has no entries with routing"):
        plot_training(training_rows([{"step": 1, "loss": 1.0}]))


def test_the_log_is_found_from_the_model_that_training_left(tmp_path: Path) -> None:
    for step in (1, 2):
        checkpoint = tmp_path / f"checkpoint-{step}"
        checkpoint.mkdir()
        (checkpoint / "trainer_state.json").write_text(json.dumps({"global_step": step, "log_history": HISTORY[:step]}))
        torch.save({}, checkpoint / "scheduler.pt")
        torch.save({}, checkpoint / "optimizer.pt")
        torch.save({}, checkpoint / "rng_state.pth")
        (checkpoint / "model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
    (tmp_path / "model").mkdir()
    assert find_history(tmp_path / "model") == HISTORY[:2] == find_history(tmp_path)
    assert find_history(tmp_path / "checkpoint-1") == HISTORY[:1]
    assert find_history(tmp_path / "nowhere" / "else") is None
    (tmp_path / "model.gguf").touch()
    assert find_history(tmp_path / "model.gguf") is None
