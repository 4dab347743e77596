"""Promises of the bars, tables and the map: what Gradio's components are given is what was computed."""

from __future__ import annotations

import json

import pytest
import torch

pytest.importorskip("gradio", reason="the app extra is not installed")

from moh.config import MoHConfig
from moh.explore import parts
from moh.inspection.trace import LayerTrace


def dense_and_routed() -> list[LayerTrace]:
    gates = torch.tensor([[[1.0, 0.0, 0.5]]])
    return [LayerTrace("a", None, gates, gates), LayerTrace("b", MoHConfig(3, (1,), 1), gates, gates)]


@pytest.mark.parametrize("largest, top", [(0.5, 1.0), (2.0, 2.0)], ids=["at-most-1", "above-1"])
def test_the_map_has_each_layers_heads_and_one_scale(largest: float, top: float) -> None:
    values = [torch.tensor([0.25, 0.0, largest])] * 2
    made = json.loads(json.dumps(parts.heads("t", dense_and_routed(), values, what="gate", chosen=(1, 2))))
    assert [(layer["heads"], layer["routed"], layer["shared"]) for layer in made["layers"]] == [
        (3, False, []),
        (3, True, [1]),
    ]
    assert made["values"] == [[0.25, 0.0, largest]] * 2 and made["top"] == top
    assert (made["title"], made["what"], made["chosen"]) == ("t", "gate", [1, 2])


def test_a_model_of_unknown_attention_has_no_map() -> None:
    made = parts.heads("t", [], [], what="load")
    assert "not shown" in made["title"] and made["layers"] == []


def test_bars_show_white_space_and_add_up_what_looks_the_same() -> None:
    made = parts.likeliest("t", [(" the\n", 0.5), (" the\n", 0.25), ("a", 0.125)])
    confidences = made.postprocess({"␣the↵": 0.75, "a": 0.125})
    assert made.label == "t" and made.value == confidences.model_dump()


def test_a_table_has_its_row_headings_and_is_hidden_while_empty() -> None:
    made = parts.filled(["x", "y"], [("perplexity", ["1", "2"]), ("time", ["3", "4"])])
    assert made.value["headers"] == ["", "x", "y"] and made.visible
    assert made.value["data"] == [["perplexity", "1", "2"], ["time", "3", "4"]]
    assert not parts.filled([], []).visible


@pytest.mark.parametrize(
    "value, said",
    [(None, "–"), (3.14159, "3.142"), (123_456.0, "123,456"), (float("inf"), "∞"), (float("nan"), "not a number")],
)
def test_numbers_are_short(value: float | None, said: str) -> None:
    assert parts.number(value) == said
