"""Promises of `moh info`: which backend would handle a call, why the others would not, and what a model runs."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from moh.attention import BACKENDS, Call, choose_backend, cpu, projections

SHAPE = ["--shape", 2, 4, 2, 8, 16]


@pytest.mark.parametrize(
    "options, named, change",
    [
        pytest.param([], "float32 on cpu", {}, id="float32"),
        pytest.param(["--train"], "float32 on cpu with gradients", dict(train=True), id="with-gradients"),
        pytest.param(["--dtype", "float64"], "float64 on cpu", dict(dtype=torch.float64), id="float64"),
        pytest.param(["--dropout", 0.1], "float32 on cpu", dict(dropout_p=0.1), id="dropout"),
    ],
)
def test_it_names_the_backend_that_such_a_call_gets(moh, options, named, change) -> None:
    result = moh("info", *SHAPE, *options)
    assert result.code == 0
    made = dict(dtype=change.get("dtype", torch.float32), requires_grad=change.get("train", False))
    q, k, gates = torch.ones(2, 4, 8, 16, **made), torch.ones(2, 2, 8, 16, **made), torch.ones(2, 8, 4, **made)
    chosen = choose_backend(Call(q, k, k, gates, dropout_p=change.get("dropout_p", 0.0))).name
    assert result.out[0] == f"{chosen} handles B2 H4/2 N8 D16 {named}"
    reasons = dict(line.strip().split(maxsplit=1) for line in result.out[1:])
    assert list(reasons) == list(BACKENDS)
    assert [name for name, reason in reasons.items() if reason == "handles it"] == [chosen]


def test_it_tells_why_a_backend_would_be_passed_over(moh) -> None:
    reasons = dict(line.strip().split(maxsplit=1) for line in moh("info", *SHAPE, "--dropout", 0.5).out[1:])
    assert "dropout" in reasons["flex"]
    assert "heads_per_group" in reasons["grouped"]
    assert reasons["reference"] == "could handle it, but comes later"
    reasons = dict(line.strip().split(maxsplit=1) for line in moh("info", *SHAPE).out[1:])
    assert reasons["flex"] == "on cpu it is used only by name"


@pytest.mark.parametrize(
    "tokens, options, words",
    [
        pytest.param(8, ["--share", 0.5], "dense; cpu: it needs at least 64 tokens", id="few-tokens"),
        pytest.param(
            100,
            ["--share", 0.9],
            f"dense; cpu: with more than {projections._max_shares().float32:.0%} of the heads",
            id="most-heads",
        ),
        pytest.param(100, ["--share", 0.5, "--dtype", "float64"], "dense; cpu: it computes float32", id="float64"),
    ],
)
def test_it_tells_what_would_project_queries_and_output(moh, tokens, options, words) -> None:
    result = moh("info", "--shape", 2, 4, 2, tokens // 2, 16, *options)
    assert result.code == 0
    lines = result.out[1 + len(BACKENDS) :]
    assert lines[0].startswith(f"projections of {options[1]:.0%} of the heads, width 64")
    for kind, line in zip(("queries", "output"), lines[1:], strict=True):
        name, reason = line.strip().split(maxsplit=1)
        assert name == kind and reason.startswith(words)
        assert reason.endswith("triton: on cpu it is used only by name") or "float64" in options


def test_it_names_the_projections_of_active_heads_where_they_serve(moh, monkeypatch) -> None:
    monkeypatch.setattr("moh.attention.cpu.unavailable", lambda: None)
    lines = moh("info", "--shape", 2, 4, 2, 50, 16, "--share", 0.5).out[-2:]
    assert [line.split() for line in lines] == [["queries", "cpu"], ["output", "cpu"]]


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--shape", 2, 4, 3, 8, 16], "HKV a divisor of H"),
        (["--shape", 0, 4, 2, 8, 16], "each at least 1"),
        ([*SHAPE, "--device", "sideways"], "--device must be cpu or cuda, got 'sideways'"),
        ([*SHAPE, "--device", "meta"], "--device must be cpu or cuda, got 'meta'"),
        ([*SHAPE, "--device", "cuda:99"], "CUDA devices here"),
        ([*SHAPE, "--share", 0.0], "--share must be above 0 and at most 1, got 0.0"),
        ([*SHAPE, "--dropout", 1.5], "--dropout must be at least 0 and below 1, got 1.5"),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, list) else None,
)
def test_a_call_that_could_not_be_is_told_in_one_line(moh, argv, message) -> None:
    result = moh("info", *argv)
    assert result.code != 0 and not result.out
    assert len(result.err) == 1 and message in result.err[0]


def test_it_tells_what_a_models_implementations_compute(moh, moh_dir, base_dir) -> None:
    result = moh("info", moh_dir)
    assert result.code == 0
    lines = dict(line.strip().split(maxsplit=1) for line in result.out[1:])
    q, gates = torch.ones(1, 4, 512, 8), torch.ones(1, 512, 4)
    chosen = choose_backend(Call(q, q, q, gates)).name
    assert lines["moh"].startswith(f"the default: {chosen} on cpu in float32; computes ")
    assert not any("saves nothing" in lines[name] for name in ("moh", "moh_sdpa"))
    assert "saves nothing" in lines["moh_reference"] and "eager, sdpa, flash_attention_2" in lines["any"]
    assert "dense, so every attention implementation" in moh("info", base_dir).out[0]
    assert moh("info", moh_dir, "--dtype", "float64").out[2].split()[3] == "sdpa"


@pytest.mark.parametrize(
    "field, said",
    [
        pytest.param({}, "moh, the default; computes 50% of the heads", id="default"),
        pytest.param({"attn_implementation": "moh_sdpa"}, "moh_sdpa, from config.json; computes 50% of", id="ours"),
        pytest.param(
            {"attn_implementation": "moh_reference"}, "moh_reference, from config.json; computes all", id="slow"
        ),
        pytest.param(
            {"attn_implementation": "eager"}, "eager, from config.json; computes all heads, saves", id="foreign"
        ),
        pytest.param(
            {"attn_implementation": "moh_grouped"}, "moh_grouped, from config.json; computes all", id="ungrouped"
        ),
        pytest.param({"_attn_implementation": "sdpa"}, "sdpa, from config.json; computes all heads", id="old-name"),
        pytest.param({"attn_implementation": "flash"}, "flash, from config.json; can't be loaded so: ", id="unknown"),
    ],
)
def test_it_says_what_a_model_is_loaded_with_and_whether_that_saves_anything(
    moh, moh_dir, tmp_path, field, said
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(moh_dir, folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps(config | field), encoding="utf-8")
    result = moh("info", folder)
    assert result.code == 0
    runs = result.out[1].split(maxsplit=1)
    assert runs[0] == "runs" and runs[1].startswith(said)
    if "can't" not in said:
        from transformers import AutoModelForCausalLM

        loaded = AutoModelForCausalLM.from_pretrained(folder)
        assert loaded.config._attn_implementation == said.split(",")[0]
    else:
        assert "attn_implementation='moh' works" in runs[1]


def test_it_lists_the_instruction_sets_and_why_one_cannot_be_used(moh, monkeypatch) -> None:
    monkeypatch.setattr(cpu, "unavailable", lambda: None)
    monkeypatch.setattr(cpu, "instruction_set", lambda: "avx512")
    monkeypatch.setattr(cpu, "instruction_sets", lambda: ["avx512", "portable"])
    monkeypatch.setattr(cpu, "instruction_sets_left_out", lambda: {"amx": "Linux refuses it"})
    lines = [line.split() for line in moh("info").out[-3:]]
    assert lines == [["avx512", "in", "use"], ["portable", "works"], "amx does not work: Linux refuses it".split()]
