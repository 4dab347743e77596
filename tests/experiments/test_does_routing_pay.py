"""Promise: every method of the comparison makes a model with the heads asked for, and the page shows all cells."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers", reason="the llm extra is not installed")

import transformers
from does_routing_pay_models import METHODS, NOT_MODELS, RANDOM, ROUTED, Compared
from does_routing_pay_report import write

from moh.conversion.fitted import DROPPED, DROPPED_LINEAR

SIZES = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4)


@pytest.fixture(scope="module")
def fitted() -> Compared:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        **SIZES, num_key_value_heads=2, pad_token_id=0, bos_token_id=None, eos_token_id=None
    )
    return Compared(transformers.LlamaForCausalLM(config).eval(), torch.randint(64, (24, 16)), router="linear")


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
def test_random_heads_follow_the_seed(fitted) -> None:
    ids, logits = torch.randint(64, (2, 16)), []
    for seed in (0, 0, 1):
        with fitted.dense_with(fitted.make_any(RANDOM, 12, seed).changes) as model:
            logits.append(model(ids).logits)
    assert torch.equal(logits[0], logits[1]) and not torch.equal(logits[0], logits[2])


def test_the_page_and_the_picture_show_every_cell(tmp_path) -> None:
    about = dict(model="tiny", cpu="a CPU", threads=1, torch="2", calibration_tokens=8, heldout_tokens={"a": 4, "b": 4},
                 calibrated_on=["a"], dense={"a": 2.0, "b": 3.0}, dense_cache=100)  # fmt: skip
    text = dict(perplexity=2.5, above=12.5, stderr=0.5, used=3.2)
    cells = [
        dict(about, kind="quality", method=method, aim=0.75, share=0.75, used=[3], cache=50, texts=dict(a=text, b=text))
        | ({} if method in NOT_MODELS else dict(parameters=2e6))
        for method in METHODS
    ]
    ratios = dict(to_dense=0.9, ratios=[0.9], dense_rate=1.0)
    cells += [
        dict(kind="speed", model="tiny", method=method, aim=0.75, length=8, share=0.75, cpu="a CPU", threads=1,
             prefill=ratios, decode=ratios) for method in METHODS if method not in NOT_MODELS
    ]  # fmt: skip
    write(tmp_path, tmp_path, cells)
    page = (tmp_path / "does_routing_pay.md").read_text()
    for method in METHODS:
        rise = "+12.5 ± 0.5 (80%)" if method == ROUTED else "+12.5 ± 0.5"
        assert f"| 75% | {method} | {rise} | {rise} |" in page
        assert (f"| 75% | {method} | 0.90 | 0.90 |" in page) is (method not in NOT_MODELS)
    assert (tmp_path / "does_routing_pay.png").stat().st_size > 1000
