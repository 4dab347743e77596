"""Promise: arms differ by their heads alone, a run may be stopped anywhere, and the page has complete arms only."""

from __future__ import annotations

import dataclasses
import json
import time

import pytest
import torch

pytest.importorskip("transformers", reason="the llm extra is not installed")

import claims
from claims import ARMS, HEADS, arm_of, cell_file, parse, recipe_of, run
from claims_report import collect, interval, write_page
from transformers import LlamaConfig, LlamaForCausalLM

WORDS = "the head of a layer reads what other tokens wrote and adds it to the sum that the next layer reads".split()
TINY = "--corpora a b --layers 1 --width 48 --vocabulary 300 --seq-len 16 --batch 2 --tokens 192 --seeds 0 1".split()
TINY += ["--heldout-tokens", "64", "--precision", "fp32"]


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """A directory with two texts, as `export_texts` leaves them."""
    work = tmp_path_factory.mktemp("claims")
    (work / "text").mkdir()
    for corpus, start in (("a", 1), ("b", 2)):
        for part, count in (("train", 20), ("heldout", 10)):
            documents = [" ".join(WORDS[(start + i * j) % len(WORDS)] for j in range(60)) for i in range(count)]
            lines = "".join(json.dumps({"text": document}) + "\n" for document in documents)
            (work / "text" / f"{corpus}.{part}.jsonl").write_text(lines)
    return work


@pytest.fixture
def options(text, tmp_path):
    return parse([*TINY, "--work", str(text), "--out", str(tmp_path), "--arms", "dense", "moh_75"])


@pytest.mark.parametrize("name", [*ARMS, "moh_9_0", "moh_7_2"])
def test_recipes_differ_in_heads_and_balance_alone(options, text, name) -> None:
    dense, ours = (recipe_of(arm, 0, options, text, text) for arm in ("dense", name))
    same = dataclasses.replace(ours.model.from_scratch, num_attention_heads=HEADS, moh=None)
    assert same == dense.model.from_scratch and ours.data == dense.data
    assert dataclasses.replace(ours.training, balance_loss_coef=0.0) == dense.training


@pytest.mark.parametrize(
    ("name", "used"),
    [
        ("gates", 12),
        ("moh_75", 9),
        ("static_75", 9),
        ("static_gates_75", 9),
        ("moh_50", 6),
        ("static_50", 6),
        ("moh_8_3", 8),
    ],
)
def test_arms_of_a_share_use_as_many_heads(name, used) -> None:
    arm = arm_of(name)
    assert (arm.shared + arm.active if arm.router else arm.heads) == used


@pytest.mark.parametrize("name", ["moh_13_2", "moh_4_4", "moh_0_0", "moh_9", "sparse"])
def test_unknown_arms_are_refused(name) -> None:
    with pytest.raises(ValueError, match=f"moh_A_S.*got '{name}'"):
        arm_of(name)


def test_a_fixed_mask_makes_a_model_with_fewer_heads() -> None:
    sizes = dict(vocab_size=32, hidden_size=24, intermediate_size=16, num_hidden_layers=1, head_dim=8, pad_token_id=0)
    torch.manual_seed(0)
    whole = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=3))
    less = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2))
    state = whole.state_dict()
    for name, tensor in less.state_dict().items():
        state_of = state[name][: len(tensor)] if "o_proj" not in name else state[name][:, : tensor.shape[1]]
        tensor.copy_(state_of)
    layer = whole.model.layers[0].self_attn
    mask = torch.arange(24) < 16  # the third head is hidden
    layer.o_proj.register_forward_pre_hook(lambda module, heads: (heads[0] * mask, *heads[1:]))
    ids = torch.randint(32, (2, 9))
    loss = whole(ids, labels=ids).loss
    loss.backward()
    torch.testing.assert_close(loss, less(ids, labels=ids).loss)
    assert layer.q_proj.weight.grad[16:].abs().max() == 0 and layer.o_proj.weight.grad[:, 16:].abs().max() == 0


class _Stop:
    """`time` for the script: its deadline has come after so many steps."""

    def __init__(self, steps: int) -> None:
        self._left = steps
        self.process_time = time.process_time

    def monotonic(self) -> float:
        self._left -= 1
        return 0.0 if self._left > 0 else 2.0


@pytest.mark.parametrize("name", ["dense", "moh_75"])
def test_a_run_in_pieces_ends_as_one_in_one_piece(options, text, monkeypatch, name) -> None:
    import claims_training

    options.work = text
    run(name, 0, options, None)
    whole = cell_file(name, 0, options)
    first = json.loads(whole.read_text())
    assert len(first["curve"]) == 6 and first["curve"][-1][0] == 192
    claims.shutil.rmtree(whole.with_suffix(""))
    whole.unlink()
    for _ in range(2):
        monkeypatch.setattr(claims_training, "time", _Stop(2))
        run(name, 0, options, 1.0)
        assert not whole.exists() and list(whole.with_suffix("").glob("checkpoint-*"))
    monkeypatch.undo()
    run(name, 0, options, None)
    again = json.loads(whole.read_text())
    assert again["loss"] == pytest.approx(first["loss"], abs=1e-6)
    assert [point for _, point in again["curve"]] == pytest.approx([point for _, point in first["curve"]], abs=1e-6)
    assert not list(whole.with_suffix("").glob("checkpoint-*"))


def test_another_setting_is_another_run(options) -> None:
    before = cell_file("dense", 0, options)
    for name, value in (("tokens", 64), ("learning_rate", 1e-4), ("width", 24), ("heldout_tokens", 32)):
        changed = parse([*TINY, "--work", str(options.work), f"--{name.replace('_', '-')}", str(value)])
        assert cell_file("dense", 0, changed) != before
    assert cell_file("dense", 1, options) != before and cell_file("gates", 0, options) != before


def test_the_page_has_complete_arms_only(options, tmp_path) -> None:
    options.arms, options.seeds = ["dense", "gates", "moh_75"], [0, 1]
    for arm, gain, seeds in (("dense", 0.0, (0, 1)), ("gates", 0.1, (0, 1)), ("moh_75", 0.2, (0,))):
        for seed in seeds:
            loss = 3.0 - gain + 0.01 * seed + (0.001 * seed if gain else 0)
            figures = {key: getattr(options, key) for key in (*claims.SIZES["small"], "corpora", "precision")}
            figures |= dict(
                arm=arm, seed=seed, **arm_of(arm)._asdict(), steps=6, parameters=1000, device="a CPU", threads=1
            )
            figures |= dict(torch="2", loss=loss, perplexity=20.0, heldout_tokens=64, curve=[[96, 4.0], [192, loss]])
            figures["corpora_loss"] = {corpus: {"loss": loss, "tokens": 32} for corpus in options.corpora}
            cell_file(arm, seed, options).write_text(json.dumps(figures))
    assert collect(options)
    write_page(options.out, options.name)
    page = (tmp_path / "claims.md").read_text()
    assert "gates, 100 % – dense | -0.0995 ± 0.0064 | 2 of 2 | better" in page and "MoH" not in page
    assert (tmp_path / "claims.png").stat().st_size > 1000
    for file in options.work.glob("*.json"):
        file.unlink()
    (tmp_path / "claims.md").unlink()
    write_page(options.out, options.name)  # from the committed figures alone
    assert (tmp_path / "claims.md").read_text() == page
    assert not collect(options)


def test_an_interval_holds_the_mean_of_few_seeds() -> None:
    middle, half = interval([1.0, 2.0, 3.0])
    assert middle == 2.0 and half == pytest.approx(4.303 / 3**0.5)
