"""Promise: every method of the comparison makes a model with the heads asked for, and the page shows all cells."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers", reason="the llm extra is not installed")

import does_routing_pay
import does_routing_pay_tuned
import transformers
from does_routing_pay_models import AVERAGES, METHODS, NOT_MODELS, RANDOM, ROUTED, SAME_NUMBER, SHORT, Compared
from does_routing_pay_report import CONTROL, TUNED, write

import moh
from moh.conversion.fitted import DROPPED, DROPPED_LINEAR
from moh.evaluation import perplexity

SIZES = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4)


@pytest.fixture(scope="module")
def fitted() -> Compared:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        **SIZES, num_key_value_heads=2, pad_token_id=0, bos_token_id=None, eos_token_id=None
    )
    mixed = [torch.randint(64, (12, 16)), torch.randint(64, (3, 64))]
    return Compared(transformers.LlamaForCausalLM(config).eval(), torch.randint(64, (24, 16)), mixed=mixed)


@pytest.mark.parametrize("method", METHODS)
@torch.no_grad()
def test_every_method_keeps_as_many_heads(fitted, method) -> None:
    made = fitted.make_any(method, 12)
    assert sum(made.used) == 12 and len(made.cached) == 4
    assert all(n in (0, 4) for n in made.used) or method not in (DROPPED, DROPPED_LINEAR)
    ids = torch.randint(64, (2, 16))
    if method in NOT_MODELS:
        before = fitted.adapter.model(ids).logits
        with fitted.dense_with(made.changes) as model:
            assert not torch.allclose(model(ids).logits, before)
        assert torch.equal(fitted.adapter.model(ids).logits, before)
    else:
        assert made.model.config.share == 12 / 16 and made.model(ids).logits.isfinite().all()


@torch.no_grad()
def test_as_many_heads_for_every_token_and_blocks_of_two_lengths_make_other_models(fitted) -> None:
    ids = torch.randint(64, (2, 16))
    found, logits = {}, {}
    for method in (ROUTED, SHORT, SAME_NUMBER):
        model = fitted.make_any(method, 12).model
        with moh.record_routing(model) as routing:
            logits[method] = model(ids).logits
        found[method] = [info.active.sum(-1).unique().numel() for _, info in routing]
    assert set(found[SAME_NUMBER]) == {1} and max(found[SHORT]) > 1
    assert not torch.allclose(logits[SHORT], logits[SAME_NUMBER])
    assert not torch.allclose(logits[SHORT], logits[ROUTED])


@pytest.mark.parametrize("method", [method for method in METHODS if method not in NOT_MODELS])
@torch.no_grad()
def test_the_heads_that_a_text_used_are_those_of_its_tokens(fitted, method) -> None:
    made, blocks = fitted.make_any(method, 12), torch.randint(64, (3, 16))  # two batches of unequal size
    original = perplexity(fitted.adapter.model, blocks)
    used = does_routing_pay._rise(fitted, made, blocks, original)["used"]
    with moh.record_routing(made.model) as routing:
        made.model(blocks)
    routed = sum(float(info.active.sum(-1).float().mean()) for _, info in routing if info.config.router != "fixed")
    fixed = sum(c.num_shared for c in made.model.config.layer_configs() if c.router == "fixed")
    assert used == pytest.approx(routed + fixed)
    assert method in AVERAGES or used == pytest.approx(sum(made.used))


ASKED = dict(texts=["a", "b"], third="c", calibration_tokens=8, heldout_tokens=4)


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        (None, None),
        (dict(third="d"), r"measured with texts \['a', 'b', 'c'\], not \['a', 'b', 'd'\]: choose another --work"),
        (dict(calibration_tokens=16), "measured with calibration_tokens 8, not 16"),
        (dict(heldout_tokens=8), "measured with heldout_tokens 4, not 8"),
    ],
    ids=["same", "third", "calibration", "heldout"],
)
def test_a_cell_of_other_options_is_refused(tmp_path, changed, reason) -> None:
    file, kept = tmp_path / "cell.json", does_routing_pay.quality_options(argparse.Namespace(**ASKED))
    asked = does_routing_pay.quality_options(argparse.Namespace(**ASKED | (changed or {})))
    assert not does_routing_pay.is_measured(file, asked)
    file.write_text(json.dumps({"options": kept}))
    if reason is None:
        assert does_routing_pay.is_measured(file, asked)
        with pytest.raises(ValueError, match="measured with router threshold, not linear"):
            does_routing_pay.is_measured(file, asked | {"router": "linear"})
        file.write_text("{}")
        reason = "does not state its options"
    with pytest.raises(ValueError, match=reason):
        does_routing_pay.is_measured(file, asked)


def test_shares_are_timed_that_are_the_same_but_for_rounding() -> None:
    options = argparse.Namespace(shares=None, timed_shares=[0.7777777778, 1 - 4 / 9, 0.78])
    assert does_routing_pay.timed_shares(options, "SmolLM2-135M") == [7 / 9, 5 / 9]


@torch.no_grad()
def test_random_heads_follow_the_seed(fitted) -> None:
    ids, logits = torch.randint(64, (2, 16)), []
    for seed in (0, 0, 1):
        with fitted.dense_with(fitted.make_any(RANDOM, 12, seed).changes) as model:
            logits.append(model(ids).logits)
    assert torch.equal(logits[0], logits[1]) and not torch.equal(logits[0], logits[2])


def _page_cells() -> list[dict]:
    quality = dict(texts=["a", "b", "c"], calibration_tokens=8, heldout_tokens=4_096)
    about = dict(model="tiny", cpu="a CPU", threads=1, torch="2", calibration_tokens=8, heldout_tokens={"a": 4, "b": 4},
                 calibrated_on=["a"], dense={"a": 2.0, "b": 3.0}, dense_cache=100, options=quality)  # fmt: skip
    text = dict(perplexity=2.5, above=12.5, stderr=0.5, used=3.2)
    cells = [
        dict(about, kind="quality", method=method, aim=0.75, share=0.75, used=[3], cache=50, texts=dict(a=text, b=text))
        | ({} if method in NOT_MODELS else dict(parameters=2e6))
        for method in METHODS
    ]
    ratios = dict(to_dense=0.9, ratios=[0.9], dense_rate=1.0)
    cells += [
        dict(kind="speed", model="tiny", method=method, aim=0.75, length=8, share=0.75, cpu="a CPU", threads=1,
             options=dict(repeats=2),
             prefill=ratios, decode=ratios) for method in METHODS if method not in NOT_MODELS
    ]  # fmt: skip
    losses = {SHORT: [1.1, 1.3], CONTROL: [1.0, 1.2]}
    options = dict(
        ASKED, tokens=2048, batch_size=2, learning_rate=1e-3, seed=0, precision="fp32", only=["o_proj", "router"]
    )
    cells += [
        dict(kind="tuned", model="tiny", method=method, aim=0.75, seconds=90.0, options=options,
             texts={"a": dict(perplexity=3.0, block_losses=losses[method], used=0.7)}) for method in losses
    ]  # fmt: skip
    return cells


def test_the_page_and_the_picture_show_every_cell(tmp_path) -> None:
    write(tmp_path, tmp_path, _page_cells())
    page = (tmp_path / "does_routing_pay.md").read_text()
    for method in METHODS:
        rise = "+12.5 ± 0.5 (80%)" if method in AVERAGES else "+12.5 ± 0.5"
        assert f"| 75% | {method} | {rise} | {rise} |" in page
        assert (f"| 75% | {method} | 0.90 | 0.90 |" in page) is (method not in NOT_MODELS)
    assert f"| 75% | {SHORT} | W_O, routers | +10.5 ± 0.0 (70%) | 2 |" in page  # exp(0.1) - 1
    (tuned,) = [line for line in page.splitlines() if "_tuned.py" in line]
    tokens = "--tokens 2048 --heldout-tokens 4 --learning-rate 0.001"
    assert tuned.endswith(
        f"--model tiny --method '{SHORT}' --shares 0.75 --texts a b --third c {tokens} --only o_proj router"
    )
    quality, speed = (next(x for x in page.splitlines() if f"--only {kind}" in x) for kind in ("quality", "speed"))
    assert quality.endswith("--texts a b --third c --calibration-tokens 8") and speed.endswith("--repeats 2")
    assert (tmp_path / "does_routing_pay.png").stat().st_size > 1000


def test_a_tuned_model_without_a_control_is_an_error(tmp_path) -> None:
    cells = [cell for cell in _page_cells() if cell["method"] != CONTROL]
    with pytest.raises(ValueError, match=r"of tiny at share 0\.750, tuned with .* has no dense control"):
        write(tmp_path, tmp_path, cells)
    assert not (tmp_path / "does_routing_pay.md").exists()


def test_models_tuned_with_other_options_have_other_files() -> None:
    def file(share: float = 0.75, **changed: object) -> Path:
        values = {name: list(v) if isinstance(v, tuple) else v for name, v in TUNED.items()} | changed
        return does_routing_pay_tuned.tuned_file(
            argparse.Namespace(work=Path("w"), model="tiny", **({"method": SHORT} | values)), share
        )

    other = dict(texts=["a", "b"], third="c", tokens=8, heldout_tokens=4, learning_rate=1e-3, batch_size=1,
                 only=["router"], seed=1, precision="bf16")  # fmt: skip
    assert other.keys() == TUNED.keys()
    files = [file(), *(file(**{name: value}) for name, value in other.items())]
    assert len(set(files)) == len(files)
    assert file().name == "tiny-routed_blocks_of_512-0.750-tuned-o_proj-0.json"  # as the committed cells have it
    assert file(method=ROUTED) not in files
    assert file(1.0, only=["router"]) == file(1.0) != file(1.0, tokens=8)
