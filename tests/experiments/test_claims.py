"""Promise: arms differ by their heads alone, a run may be stopped anywhere, and the page has complete arms only."""

from __future__ import annotations

import dataclasses
import json
import time
from statistics import stdev

import pytest
import torch

pytest.importorskip("transformers", reason="the llm extra is not installed")

import claims
from claims import ARMS, HEADS, arm_of, cell_file, parse, recipe_of, run
from claims_report import collect, interval, markdown, write_page
from transformers import LlamaConfig, LlamaForCausalLM

from moh._files import locked

WORDS = "the head of a layer reads what other tokens wrote and adds it to the sum that the next layer reads".split()
TINY = "--corpora a b --layers 1 --width 48 --vocabulary 300 --seq-len 16 --batch 2 --tokens 192 --seeds 0 1".split()
TINY += ["--heldout-tokens", "64", "--precision", "fp32", "--name", "claims"]


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


def test_fields_with_their_defaults_do_not_count_in_the_name_of_a_run() -> None:
    part = dataclasses.make_dataclass("Part", [("b", int, 2)])
    fields = [("a", int), ("part", part, dataclasses.field(default_factory=part))]
    before = dataclasses.make_dataclass("Recipe", fields)
    after = dataclasses.make_dataclass("Recipe", [*fields, ("new", str, "off")])
    assert claims._set_fields(before(1)) == claims._set_fields(after(1)) == {"a": 1}
    assert claims._set_fields(after([part(3), part()], part(3))) == {"a": [{"b": 3}, {}], "part": {"b": 3}}
    assert claims._set_fields(after(1, new="on")) == {"a": 1, "new": "on"}


@pytest.mark.parametrize(
    "changed",
    [["--arms", "dense"], ["--seeds", "0"], ["--layers", "1"], ["--corpora", "botchan"], ["--heldout-tokens", "512"]],
    ids=" ".join,
)
def test_other_options_than_those_of_the_committed_results_need_a_name(changed, capsys) -> None:
    with pytest.raises(SystemExit):
        parse(changed)
    assert f"--name must be given with {changed[0]}: without it" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        parse([*changed, "--size", "large"])
    assert parse([*changed, "--name", "mine"]).name == "mine"
    assert parse([*changed, "--only", "runs"]).arms  # writes no results


def test_each_size_has_its_own_results() -> None:
    assert parse([]).name == parse(["--minutes", "9"]).name == "claims"
    assert parse(["--size", "large"]).name == parse(["--size", "large", "--only", "page"]).name == "claims_large"
    assert parse(["--size", "tiny"]).name == "claims_tiny"


@pytest.fixture
def alone(options, monkeypatch):
    """`main` on one arm and seed, without texts and page."""
    options.arms, options.seeds, options.only = ["dense"], [0], "runs"
    monkeypatch.setattr(claims, "parse", lambda: options)
    monkeypatch.setattr(claims, "export_texts", lambda arguments: None)
    file = cell_file("dense", 0, options)
    file.unlink(missing_ok=True)
    yield file
    file.unlink(missing_ok=True)


def test_a_run_that_another_process_has_just_finished_is_not_run_again(alone, monkeypatch, capsys) -> None:
    def finished_meanwhile(path, **kwargs):
        if path == alone:
            path.write_text("{}")
        return locked(path, **kwargs)

    monkeypatch.setattr(claims, "locked", finished_meanwhile)
    monkeypatch.setattr(claims, "run", None)
    claims.main()
    assert "1 of 1 runs are finished" in capsys.readouterr().out


def test_a_run_of_another_process_is_left_to_it_and_other_errors_are_raised(alone, monkeypatch, capsys) -> None:
    def run(*arguments):
        raise ValueError("data.files: another process is writing nonsense")

    monkeypatch.setattr(claims, "run", run)
    with locked(alone):
        claims.main()
    assert "another process is at it" in capsys.readouterr().out
    with pytest.raises(ValueError, match="writing nonsense"):
        claims.main()


def figures_of(arm, seed, options, loss) -> dict:
    """What a finished run leaves."""
    figures = {key: getattr(options, key) for key in (*claims.SIZES["small"], "corpora", "precision", "compile")}
    figures |= dict(arm=arm, seed=seed, **arm_of(arm)._asdict(), steps=6, parameters=1000, device="a CPU", threads=1)
    figures |= dict(torch="2", loss=loss, perplexity=20.0, heldout_tokens=64, curve=[[96, 4.0], [192, loss]])
    return figures | {"corpora_loss": {corpus: {"loss": loss, "tokens": 32} for corpus in options.corpora}}


@pytest.mark.parametrize(
    ("arms", "heads"),
    [
        (["dense", "gates", "moh_75"], "weights (4 shared heads)"),
        (["dense", "moh_9_2", "moh_8_2"], "weights (2 shared heads)"),
        (["moh_9_0", "moh_9_2"], "weights (shared heads as in the table)"),
        (["dense", "static_75"], None),
    ],
    ids=str,
)
def test_the_page_says_what_its_runs_are_and_how_to_make_them(options, arms, heads) -> None:
    options.precision = "fp32"
    page = markdown({arm: [figures_of(arm, seed, options, 3.0) for seed in (0, 1)] for arm in arms}, "mine")
    assert (heads in page) if heads else ("*Gates*" not in page)
    assert ("*Static*" in page) is ("static_75" in arms)
    assert page.startswith("# The claims, one at a time\n") is ("gates" in arms or "static_75" in arms)
    sizes = "--layers 1 --width 48 --vocabulary 300 --seq-len 16 --batch 2 --tokens 192"
    given = f"{sizes} --corpora a b --arms {' '.join(arms)} --seeds 0 1 --name mine --precision fp32"
    assert f"`python experiments/claims.py {given}` measures" in page


def test_the_page_of_all_runs_of_a_size_names_the_size_alone() -> None:
    for size, words in (("small", ""), ("large", " --size large")):
        options = parse(["--size", size, "--precision", "bf16", "--compile"])
        runs = {arm: [figures_of(arm, seed, options, 3.0) for seed in options.seeds] for arm in ARMS}
        assert f"`python experiments/claims.py{words} --precision bf16 --compile` measures" in markdown(
            runs, options.name
        )


def test_results_of_more_runs_are_not_replaced_by_fewer(options, tmp_path, capsys) -> None:
    options.arms, options.seeds = ["dense", "gates"], [0, 1]
    file = tmp_path / "claims.json"
    more = {arm: [figures_of(arm, seed, options, 3.0) for seed in (0, 1)] for arm in ("dense", "gates")}
    file.write_text(json.dumps(more))
    cells = {cell_file("dense", seed, options): figures for seed, figures in enumerate(more["dense"])}
    for cell, figures in cells.items():
        cell.write_text(json.dumps(figures))
    assert not collect(options) and json.loads(file.read_text()) == more
    assert "claims.json is kept: it has 2 runs that are not finished" in capsys.readouterr().out
    file.unlink()
    assert collect(options) and list(json.loads(file.read_text())) == ["dense"]
    for cell in cells:
        cell.unlink()


def test_the_page_has_complete_arms_only(options, tmp_path) -> None:
    options.arms, options.seeds = ["dense", "gates", "moh_75"], [0, 1]
    for arm, gain, seeds in (("dense", 0.0, (0, 1)), ("gates", 0.1, (0, 1)), ("moh_75", 0.2, (0,))):
        for seed in seeds:
            loss = 3.0 - gain + 0.01 * seed + (0.001 * seed if gain else 0)
            cell_file(arm, seed, options).write_text(json.dumps(figures_of(arm, seed, options, loss)))
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


def test_finished_runs_go_with_the_results_until_all_are_finished(options, tmp_path) -> None:
    cells = [("dense", 0), ("dense", 1)]
    first, second = (cell_file(*cell, options) for cell in cells)
    folder = tmp_path / "claims"
    first.write_text("0")
    claims.share_finished(cells, options)
    assert [file.name for file in folder.iterdir()] == [first.name]
    first.unlink()  # another machine
    claims.share_finished(cells, options)
    assert first.read_text() == "0" and not second.exists()
    (folder / "mine.txt").write_text("")
    second.write_text("1")
    claims.share_finished(cells, options)
    assert [file.name for file in folder.iterdir()] == ["mine.txt"] and first.exists() and second.exists()
    first.unlink(), second.unlink()


def test_an_interval_holds_the_mean_of_few_seeds() -> None:
    middle, half = interval([1.0, 2.0, 3.0])
    assert middle == 2.0 and half == pytest.approx(4.303 / 3**0.5)
    for count, quantile in ((10, 2.262), (11, 2.228), (12, 2.201), (21, 2.086), (61, 2.0)):  # of Student's t
        values = [float(value) for value in range(count)]
        assert interval(values)[1] == pytest.approx(quantile * stdev(values) / count**0.5, rel=2e-3)
