"""Gates and cases of the benchmarks: exact shares, balance, no case twice."""

from __future__ import annotations

import subprocess
from dataclasses import asdict, replace
from types import ModuleType

import pytest
import timm
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import moh
from benchmarks import core, decode, layer, model
from benchmarks.cases import GRIDS, Case, active_heads, balanced_gates, ideal_heads
from benchmarks.dense import weigh_heads
from benchmarks.presets import _attentions
from benchmarks.runner import SUBJECTS, select
from forks import Forks
from moh.models.transformers import MoHLlamaConfig


@pytest.mark.parametrize("active", (1, 3, 8))
@pytest.mark.parametrize("length", (64, 61))
def test_gates_have_the_same_number_of_active_heads_in_every_token(length: int, active: int) -> None:
    gates = balanced_gates(3, length, 8, active)
    assert gates.shape == (3, length, 8)
    assert set(gates.unique().tolist()) <= {0.0, 1.0}
    assert (gates.sum(-1) == active).all()


@pytest.mark.parametrize("active", (1, 3, 7))
def test_gates_give_every_head_the_same_number_of_tokens(active: int) -> None:
    assert (balanced_gates(2, 64, 8, active).sum(1) == 64 * active / 8).all()


def test_gates_of_a_length_that_is_no_multiple_of_the_heads_are_balanced_but_for_the_rest() -> None:
    counts = balanced_gates(2, 61, 8, 3).sum(1)
    assert counts.min() >= 7 * 3 and counts.max() <= 8 * 3


def test_gates_differ_between_sequences_tokens_and_seeds() -> None:
    gates = balanced_gates(2, 64, 8, 4)
    assert (gates[0] != gates[1]).any()
    assert (gates[0, 0] != gates[0]).any()
    assert (balanced_gates(2, 64, 8, 4, seed=1) != gates).any()
    assert (balanced_gates(2, 64, 8, 4) == gates).all()


@pytest.mark.parametrize("share, heads", [(0.01, 1), (0.25, 2), (0.9, 7), (1.0, 8)])
def test_active_heads_are_the_nearest_whole_number(share: float, heads: int) -> None:
    assert active_heads(share, 8) == heads


@pytest.mark.parametrize(
    "share, kv_heads, expected",
    [(0.5, 8, (4, 4)), (0.5, 2, (4, 2)), (0.9, 2, None), (1.0, 8, None)],
    ids=["all heads have keys", "grouped: groups shrink", "no even groups", "nothing left out"],
)
def test_ideal_is_a_dense_model_of_the_active_heads(
    share: float, kv_heads: int, expected: tuple[int, int] | None
) -> None:
    assert ideal_heads(share, Case("core", "forward", heads=8, kv_heads=kv_heads)) == expected


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("subject", SUBJECTS)
def test_every_case_is_there_once_and_survives_json(subject: str, grid: str) -> None:
    cases = select([subject], grid)
    assert cases and len({case.key for case in cases}) == len(cases)
    assert all(Case.from_dict(asdict(case)) == case for case in cases)


@pytest.mark.parametrize("subject", (core, decode, layer), ids=lambda m: m.__name__)
def test_contenders_are_named_and_those_that_skip_heads_say_how_many(subject: ModuleType) -> None:
    case = subject.cases("quick")[0]
    found = subject.contenders(case)
    assert found[0].name == "dense" and found[0].share is None
    ours = {c.share: c.actual for c in found if c.name == "ours"}
    assert ours == {share: active_heads(share, case.heads) / case.heads for share in case.shares}
    ideal = {c.share: c.actual for c in found if c.name == "ideal"}
    assert ideal and ideal.items() <= ours.items()


def test_cases_of_older_results_are_those_of_the_free_choice_of_heads() -> None:
    case = Case("model", "decode", heads=9, kv_heads=3, router="linear", layers=30)
    old = {name: value for name, value in asdict(case).items() if name != "routing_unit"}
    assert Case.from_dict(old) == case
    assert case.key == "model decode B1 H9/3 N512 D64 float32 linear 30 layers"
    assert replace(case, routing_unit="kv_group").key != case.key


@pytest.mark.parametrize("mode, lengths", [("prefill", [512]), ("decode", [512, 2048])])
@pytest.mark.parametrize("unit", model.GROUP_UNITS)
def test_units_of_groups_are_measured_at_a_third_and_two_thirds_of_the_heads(unit, mode, lengths) -> None:
    cases = [c for c in select(["model"], "default") if (c.routing_unit, c.mode) == (unit, mode)]
    assert [c.length for c in cases] == lengths
    assert all(c.shares == (3 / 9, 6 / 9) for c in cases)


@pytest.mark.parametrize(
    "heads, kv_heads, expected",
    [
        (32, 8, {"group_balanced": (8 / 32, 24 / 32), "kv_group": (12 / 32, 20 / 32)}),
        (8, 4, {"group_balanced": (4 / 8,), "kv_group": (2 / 8, 6 / 8)}),
        (4, 1, {"group_balanced": (1 / 4, 3 / 4)}),
        (8, 8, {}),
    ],
    ids=["large groups", "two heads a group", "one group", "no groups"],
)
def test_units_of_groups_take_whole_steps(heads: int, kv_heads: int, expected: dict[str, tuple[float, ...]]) -> None:
    found = model._of_units(replace(model.BASE, heads=heads, kv_heads=kv_heads))
    assert {case.routing_unit: case.shares for case in found} == expected


@torch.no_grad()
@pytest.mark.parametrize("unit", model.GROUP_UNITS)
def test_models_of_a_unit_choose_by_it(unit: str, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = dict(vocab_size=64, hidden_size=72, intermediate_size=48, num_hidden_layers=2)
    dense = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=9, num_key_value_heads=3)).eval()
    monkeypatch.setattr(model, "_dense", lambda case: dense)
    case = replace(model.BASE, routing_unit=unit, width=8, layers=2, shares=(3 / 9, 6 / 9))
    found = model._conversions(case)
    assert [name for name, *_ in found] == ["dense", "masked", "ours", "ideal", "ours", "ideal"]
    for _, ours, share, actual in (f for f in found if f[0] == "ours"):
        assert ours.config.routing_unit == unit and ours.config.share == actual == share
        with moh.record_routing(ours) as routing:
            ours(torch.randint(64, (1, 12)))
        for _, info in routing:
            groups = info.active.unflatten(-1, (3, 3)).sum(-1)  # [B, N, groups]
            allowed = {3 * share} if unit == "group_balanced" else {0, 3}
            assert set(groups.unique().tolist()) <= allowed and bool((groups.sum(-1) == 9 * share).all())


@torch.no_grad()
@pytest.mark.parametrize(
    "dense, moh, side, channels",
    [
        ("moh_vit_micro_patch4_28_dense", "moh_vit_micro_patch4_28_50", 28, 3),
        ("moh_transnext_micro32_dense", "moh_transnext_micro32_50", 32, 3),
    ],
    ids=["vit", "transnext"],
)
def test_dense_then_mask_computes_the_same_function(dense: str, moh: str, side: int, channels: int) -> None:
    torch.manual_seed(0)
    ours, masked = timm.create_model(moh).eval(), timm.create_model(dense).eval()
    masked.load_state_dict({k: v for k, v in ours.state_dict().items() if ".router." not in k})
    plain = masked(x := torch.randn(2, channels, side, side))
    for attention, other in zip(_attentions(masked), _attentions(ours), strict=True):
        weigh_heads(attention, attention.proj, other.router)
    torch.testing.assert_close(masked(x), ours(x), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(plain, masked(x), atol=1e-3)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_moh_checkpoint_is_measured_at_its_own_share_and_half_of_the_heads(
    base_dir, tokenizer, tmp_path, dtype
) -> None:
    dense = LlamaForCausalLM.from_pretrained(base_dir)
    moh.convert(dense, router="query_norm", shared_heads=1, active_heads=2).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    found = select(["model"], "default", checkpoint=str(tmp_path), dtype=dtype)
    assert {case.mode for case in found} == {"prefill", "decode", "training"}
    for case in [*found, replace(found[-1], mode="autocast")]:
        assert (case.dtype, case.shares, case.layers) == (dtype, (0.5, 0.75), 2)
        contenders = model.contenders(replace(case, length=40))
        assert [(c.name, c.share, c.actual) for c in contenders] == [
            ("dense", None, None), ("ours", 0.5, 0.5), ("ours", 0.75, 0.75)
        ]  # fmt: skip
        for contender in contenders:
            with torch.set_grad_enabled(case.backward):
                contender.run()


@pytest.mark.parametrize(
    "active, shares", [(7, (0.5, 7 / 9)), (6, (0.5, 6 / 9)), (4, (4 / 9,))], ids=lambda value: str(value)[:12]
)
def test_every_mode_of_a_moh_checkpoint_has_its_own_share(
    active: int, shares: tuple[float, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = dict(num_attention_heads=9, num_key_value_heads=3, num_hidden_layers=30, hidden_size=576)
    config = MoHLlamaConfig(**sizes, shared_heads=1, active_heads=active - 1)
    monkeypatch.setattr(model, "_config", lambda path: config)
    for grid in GRIDS:
        found = model.cases(grid, "moh")
        more = {"autocast"} if grid == "full" else set()
        assert {case.mode for case in found} == {"prefill", "decode", "training"} | more
        assert {case.shares for case in found} == {shares if grid != "quick" else shares[1:] or shares}


def run_without(forks: Forks, missing: str, *words: str) -> subprocess.CompletedProcess[str]:
    """`python -m benchmarks` where a package is not installed."""
    code = f"""
import importlib.util, sys
found = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name in {missing.split()} else found(name, *rest)
sys.modules |= dict.fromkeys({missing.split()})
from benchmarks.__main__ import main
sys.exit(main(sys.argv[1:]))
"""
    return forks.run(code, *words)


def test_subjects_whose_packages_are_missing_are_left_out_in_one_line(forks) -> None:
    result = run_without(forks, "timm diffusers", "--quick", "--list")
    assert result.returncode == 0, result.stderr
    subjects = {line.split("/")[0].split()[0] for line in result.stdout.splitlines()}
    assert any("core" in subject for subject in subjects)
    assert not any("images" in subject or "diffusion" in subject for subject in subjects)
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("benchmarks:")]
    assert "without images and diffusion" in line and "pip install -e '.[vision,diffusion]'" in line


def test_a_subject_that_is_asked_for_names_what_to_install(forks) -> None:
    result = run_without(forks, "timm", "images", "--quick", "--list")
    assert result.returncode == 2 and "pip install 'mixture-of-heads[vision]'" in result.stderr
