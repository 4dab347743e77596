"""Promise: the experiment with exported models compares each variant with PyTorch, resumes, and writes what it measured."""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="the llm extra is not installed")
if not hasattr(
    pytest.importorskip("transformers.exporters", reason="this transformers has no exporters"), "ExportedModel"
):
    pytest.skip("this transformers can't load what it exports", allow_module_level=True)

import exported  # noqa: E402

RESULTS = Path(__file__).resolve().parents[2] / "docs" / "results"


def tiny_encoder(layers: int) -> tuple[exported.Inputs, exported.Variants]:
    torch.manual_seed(0)
    config = transformers.BertConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                                     num_attention_heads=4)  # fmt: skip
    ids = torch.randint(0, 64, (2, 8))
    inputs = dict(input_ids=ids, attention_mask=torch.ones_like(ids))
    dense = transformers.BertModel(config).eval()
    return inputs, exported.converted(dense, ids, dict(shared_heads=1, active_heads=2))


def tiny_decoder(layers: int) -> tuple[exported.Inputs, exported.Variants]:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=layers,
                                      num_attention_heads=8, num_key_value_heads=2, head_dim=8)  # fmt: skip
    ids = torch.randint(0, 64, (1, 256))
    dense = transformers.LlamaForCausalLM(config).eval()
    heads = dict(shared_heads=2, active_heads=2, routing_unit="group_balanced")
    return dict(input_ids=ids, attention_mask=torch.ones_like(ids)), exported.converted(dense, ids, heads)


@pytest.mark.slow
def test_variants_are_exported_measured_and_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exported, "MODELS", dict(minilm=tiny_encoder))
    options = Namespace(work=tmp_path, runtime="torch", layers=exported.LAYERS, rounds=3, alone=True)
    exported.export(options, "minilm")
    made = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*.pt2")}
    assert len(made) == 3
    exported.export(options, "minilm")
    assert {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*.pt2")} == made
    exported.measure(options, "minilm")
    row = json.loads((tmp_path / "torch-minilm.json").read_text())
    kinds = row["parts"]["model"]
    assert all(kinds[kind]["error"] <= 1e-4 and len(kinds[kind]["seconds"]) == 3 for kind in exported.VARIANTS)
    assert kinds["fixed"]["bytes"] < kinds["dense"]["bytes"] < kinds["routed"]["bytes"]


@pytest.mark.parametrize(
    ("name", "finished", "missing"),
    [
        ("minilm", (), ("dense", "routed", "fixed")),
        ("minilm", ("dense", "routed"), ("fixed",)),
        ("smollm2", ("dense", "fixed"), ("routed",)),
        ("vit", ("dense",), ("routed",)),  # none with fixed heads
    ],
)
def test_a_variant_that_is_missing_is_named_with_the_command_that_makes_it(
    tmp_path: Path, name: str, finished: tuple[str, ...], missing: tuple[str, ...]
) -> None:
    folders = {kind: tmp_path / "onnx" / f"{name}-{kind}" for kind in exported.VARIANTS}
    for kind, folder in folders.items():
        (folder / "program").mkdir(parents=True)  # all were begun
        if kind in finished:
            torch.save({}, folder / "calls.pt")
    given = ["measure", "--runtime", "onnx", "--models", name, "--work", str(tmp_path), "--layers", "4"]
    with pytest.raises(ValueError, match="there is no complete export in") as error:
        exported.measure(exported.make_parser().parse_args(given), name)
    message, shown = str(error.value).split(": python experiments/exported.py ")
    assert message.endswith(" or ".join(str(folders[kind]) for kind in missing))
    options = exported.make_parser().parse_args(shown.split())
    layers = 4 if name == "smollm2" else exported.LAYERS
    assert vars(options) | dict(step="measure", layers=4) == vars(exported.make_parser().parse_args(given))
    assert (options.step, options.layers) == ("export", layers)


def test_an_export_that_was_interrupted_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is interrupted, the file that says that an export is complete is not there, not even in part."""
    made: list[Path] = []

    def fake_export(model: Any, inputs: Any, runtime: str, folder: Path, **options: Any) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        made.append(folder)

    def interrupted(value: Any, file: Path) -> None:
        file.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(exported, "MODELS", dict(minilm=tiny_encoder))
    monkeypatch.setattr(exported, "export_model", fake_export)
    options = exported.make_parser().parse_args(["export", "--runtime", "torch", "--work", str(tmp_path)])
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(torch, "save", interrupted)
        exported.export(options, "minilm")
    dense, routed, fixed = (tmp_path / "torch" / f"minilm-{kind}" for kind in exported.VARIANTS)
    assert [file.name for file in dense.iterdir()] == ["program"]
    exported.export(options, "minilm")
    exported.export(options, "minilm")
    assert made == [folder / "program" for folder in (dense, dense, routed, fixed)]
    assert all(torch.load(folder / "calls.pt") for folder in (dense, routed, fixed))


@pytest.mark.slow
def test_a_text_is_read_and_a_token_decoded_with_a_cache_of_fixed_length(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exported, "MODELS", dict(smollm2=tiny_decoder))
    options = Namespace(work=tmp_path, runtime="torch", layers=2, rounds=3, alone=True)
    exported.export(options, "smollm2")
    exported.measure(options, "smollm2")
    row = json.loads((tmp_path / "torch-smollm2.json").read_text())
    assert row["layers"] == 2 and [*row["parts"]] == ["prefill", "decode"]
    assert all(found["error"] <= 1e-4 for kinds in row["parts"].values() for found in kinds.values())


@pytest.mark.parametrize("kinds", [{}, dict(layer_types=["full_attention"] * 3)], ids=["plain", "layer_types"])
def test_the_first_layers_of_a_model_have_a_cache_of_fixed_length(kinds: dict[str, Any]) -> None:
    inputs, variants = tiny_decoder(layers=3)
    model = variants["dense"]()
    vars(model.config).update(kinds)
    exported.keep_first(model, 2)
    cache = transformers.StaticCache(config=model.config, max_cache_len=exported.CACHE)
    assert len(cache.layers) == 2
    with torch.no_grad():
        cached = model(**inputs, past_key_values=cache)
        torch.testing.assert_close(cached.logits, model(**inputs, use_cache=False).logits)


def measured(**changes: Any) -> dict[str, Any]:
    parts = {
        part: {
            kind: dict(error=2e-6, bytes=3_000_000, seconds=[0.9 * s, s, 1.2 * s])
            for kind, s in dict(dense=0.2, routed=0.1, fixed=0.05).items()
        }
        for part in ("prefill", "decode")
    }
    row = dict(runtime="onnx", model="smollm2", layers=30, parts=parts, rounds=9, cpu="a CPU", versions=dict(torch="2"))
    return row | changes


def test_the_page_has_each_program_next_to_the_dense_one() -> None:
    text = exported.page([measured()])
    (line,) = [
        line
        for line in text.splitlines()
        if line.startswith("| ONNX Runtime | SmolLM2-135M, 30 layers, 256 tokens, 6 of 9 heads")
    ]
    assert line.endswith(
        "| 2e-06 | 2e-06 | 2e-06 | 3.0 | 3.0 | 3.0 | 200.0 (180.0 to 240.0) | 0.50 (0.45 to 0.60) | 0.25 (0.23 to 0.30) |"
    )
    assert (
        text.count("| ONNX Runtime |") == 2
        and "medians of 9 calls" in text
        and "on a CPU, next to other programs; torch 2." in text
    )
    assert "of SmolLM2's 30" not in text


@pytest.mark.parametrize(
    ("alone", "company"),
    [
        ((True, True), "with nothing else running"),
        ((False, False), "next to other programs"),
        ((True, False), "with nothing else running (but for SmolLM2-135M in `torch.export`: next to other programs)"),
    ],
)
def test_the_page_says_what_else_ran_and_which_layers_were_left_out(alone: tuple[bool, bool], company: str) -> None:
    first, second = measured(alone=alone[0]), measured(runtime="torch", layers=4, alone=alone[1])
    text = exported.page([first, second])
    assert f"on a CPU, {company}; torch 2." in text
    assert "Where a row names 4 layers, only the first of SmolLM2's 30 were exported" in text


def test_a_model_without_fixed_heads_has_none_in_its_row() -> None:
    row = measured(model="vit", layers=None, parts=dict(model=measured()["parts"]["prefill"]))
    del row["parts"]["model"]["fixed"]
    (line,) = [line for line in exported.page([row]).splitlines() if "| ViT-S/16 of timm" in line]
    assert line.endswith("| 2e-06 | 2e-06 | – | 3.0 | 3.0 | – | 200.0 (180.0 to 240.0) | 0.50 (0.45 to 0.60) | – |")


def committed_rows() -> list[dict[str, Any]]:
    return list(json.loads((RESULTS / "exported.json").read_text(encoding="utf-8")))


MIXED = [
    measured(),
    measured(model="vit", layers=None, rounds=15, alone=True),
    measured(runtime="torch", layers=4, rounds=15),
]


@pytest.mark.parametrize("rows", [committed_rows(), MIXED], ids=["committed", "mixed"])
def test_the_commands_on_the_page_are_those_of_its_rows(rows: list[dict[str, Any]]) -> None:
    *lines, last = [line for line in exported.page(rows).splitlines() if line.startswith("$ ")]
    prefix = "$ python experiments/exported.py "
    assert last == f"{prefix}page"
    made = {"export": set(), "measure": set()}
    for line in lines:
        options = exported.make_parser().parse_args(line.removeprefix(prefix).split())
        for model in options.models:
            layers = options.layers if model == "smollm2" else None
            made[options.step].add((options.runtime, model, layers, options.step == "export" or options.rounds))
    cells = [(r["runtime"], r["model"], r["layers"] if r["model"] == "smollm2" else None, r["rounds"]) for r in rows]
    assert made == {"export": {(*cell[:3], True) for cell in cells}, "measure": set(cells)}


def test_the_committed_page_is_that_of_the_committed_rows() -> None:
    assert (RESULTS / "exported.md").read_text(encoding="utf-8") == exported.page(committed_rows())


def take_page(work: Path, output: Path) -> None:
    exported.take(exported.make_parser().parse_args(["page", "--work", str(work), "--output", str(output)]))


def test_the_page_keeps_committed_rows_that_were_not_measured_again(tmp_path: Path) -> None:
    work, output = tmp_path / "work", tmp_path / "results"
    work.mkdir()
    output.mkdir()
    with pytest.raises(ValueError, match=r"nothing was measured: there is no result in .*work"):
        take_page(work, output)
    assert not list(output.iterdir())
    kept = [measured(), measured(runtime="torch")]
    (output / "exported.json").write_text(json.dumps(kept), encoding="utf-8")
    take_page(work, output)
    assert json.loads((output / "exported.json").read_text()) == kept
    again = measured(runtime="torch", layers=4)
    (work / "torch-smollm2.json").write_text(json.dumps(again), encoding="utf-8")
    take_page(work, output)
    assert json.loads((output / "exported.json").read_text()) == [kept[0], again]


@pytest.mark.parametrize(
    ("other", "got"),
    [
        (["--layers", "30"], "--rounds 9 --layers 30"),
        (["--rounds", "3"], "--rounds 3 --layers 4"),
        (["--alone"], "--rounds 9 --layers 4 --alone"),
    ],
)
def test_a_result_of_other_options_is_not_taken_for_one_of_these(tmp_path: Path, other: list[str], got: str) -> None:
    (tmp_path / "onnx-smollm2.json").write_text(json.dumps(measured(layers=4)), encoding="utf-8")
    given = ["measure", "--runtime", "onnx", "--work", str(tmp_path), "--layers", "4", "--rounds", "9"]
    exported.measure(exported.make_parser().parse_args(given), "smollm2")
    with pytest.raises(ValueError, match=rf"measured with --rounds 9 --layers 4, got {got}: give the same, or another"):
        exported.measure(exported.make_parser().parse_args([*given, *other]), "smollm2")


def test_a_result_without_one_of_the_variants_is_refused(tmp_path: Path) -> None:
    row = measured(model="minilm", layers=None)
    del row["parts"]["decode"]["fixed"]
    (tmp_path / "onnx-minilm.json").write_text(json.dumps(row), encoding="utf-8")
    options = exported.make_parser().parse_args(["measure", "--runtime", "onnx", "--work", str(tmp_path)])
    with pytest.raises(
        ValueError, match=r"onnx-minilm.json has no fixed model \(decode\): delete it and measure again"
    ):
        exported.measure(options, "minilm")


def test_an_export_of_other_layers_is_refused(tmp_path: Path) -> None:
    for kind in exported.VARIANTS:
        folder = tmp_path / "onnx" / f"smollm2-{kind}"
        transformers.LlamaConfig(num_hidden_layers=4).save_pretrained(folder / "program")
        torch.save({}, folder / "calls.pt")
    options = exported.make_parser().parse_args(["measure", "--runtime", "onnx", "--work", str(tmp_path)])
    with pytest.raises(ValueError, match=r"smollm2-dense was exported with 4 layers, got --layers 30"):
        exported.measure(options, "smollm2")
