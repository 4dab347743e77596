"""The computed limits of models: those of a dense model that has only the active heads, counted apart."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks import limits, tables
from benchmarks.cases import Case
from benchmarks.limits import INTERMEDIATE, VOCABULARY, diffusion_cost, image_cost, limit
from benchmarks.model import BASE
from benchmarks.presets import DIFFUSION, IMAGES
from benchmarks.results import Machine, Result, Run
from benchmarks.timing import Row

LAYERS, TOKENS = 2, 48


def llama(heads: int) -> LlamaForCausalLM:
    """The benchmark's model with fewer query heads; its numbers don't matter."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=576,
        intermediate_size=INTERMEDIATE,
        num_hidden_layers=LAYERS,
        num_attention_heads=heads,
        num_key_value_heads=3,
        head_dim=64,
        tie_word_embeddings=False,
        attn_implementation="eager",  # products that the counter knows
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    return model.to_empty(device="cpu").eval()


def operations(heads: int, mode: str) -> int:
    model, tokens = llama(heads), torch.zeros(1, TOKENS, dtype=torch.int64)
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        model(input_ids=tokens, use_cache=False, logits_to_keep=1 if mode == "prefill" else 0)
    return counter.get_total_flops()


@pytest.mark.parametrize("mode", ["prefill", "training"])
def test_limit_of_long_texts_is_the_part_of_the_operations_that_are_left(mode: str) -> None:
    # The counter takes attention as if every token saw all others
    case = replace(BASE, mode=mode, layers=LAYERS, length=TOKENS, causal=False)
    assert limit(case, 6 / 9) == pytest.approx(operations(6, mode) / operations(9, mode), rel=1e-3)


def test_limit_of_decoding_is_the_part_of_the_numbers_that_are_still_read() -> None:
    case = replace(BASE, mode="decode", layers=LAYERS, length=TOKENS, routing_unit="group_balanced")
    cache = LAYERS * 2 * 3 * 64 * TOKENS

    def read(heads: int) -> int:
        parameters = llama(heads).named_parameters()  # of the embedding a token reads one row
        return cache + sum(p.numel() for name, p in parameters if "embed_tokens" not in name)

    assert limit(case, 6 / 9) == pytest.approx(read(6) / read(9), rel=1e-3)


@pytest.mark.parametrize("active", range(1, 10))
def test_caches_of_groups_without_an_active_head_are_not_read(active: int) -> None:
    choices = list(combinations(range(9), active))
    read = sum(len({head // 3 for head in choice}) for choice in choices) / (3 * len(choices))
    assert limits._read_caches(BASE, active / 9) == pytest.approx(read)


@pytest.mark.parametrize("mode", ["prefill", "training", "decode"])
@pytest.mark.parametrize("batch", [1, 8])
@pytest.mark.parametrize("length", [512, 8192])
def test_limit_rises_with_the_share_and_falls_with_the_length(mode: str, batch: int, length: int) -> None:
    case = replace(BASE, mode=mode, batch=batch, length=length)
    values = [limit(case, share) for share in BASE.shares]
    assert all(value is not None for value in values) and values == sorted(values) and values[-1] == 1.0
    if mode != "decode":
        longer = limit(replace(case, length=4 * length), 1 / 3)
        assert longer is not None and longer < values[0]


@pytest.mark.parametrize(
    "case", [Case("layer", "forward"), replace(BASE, model="/models/other")], ids=["layer", "checkpoint"]
)
def test_cases_of_other_sizes_have_no_limit(case: Case) -> None:
    assert limit(case, 0.5) is None


def test_a_vision_transformers_operations_are_counted_right() -> None:
    timm = pytest.importorskip("timm")
    with torch.device("meta"):
        model, image = timm.create_model("vit_tiny_patch16_224").eval(), torch.empty(1, 3, 224, 224)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(image)
    assert image_cost(IMAGES[0].case, 1.0) == pytest.approx(counter.get_total_flops() / 2, rel=1e-3)


def test_a_diffusion_transformers_operations_are_counted_right() -> None:
    pytest.importorskip("diffusers")
    from moh.models.diffusers.presets import architecture, create_dit

    with torch.device("meta"):
        model = create_dit("dit_s_2").eval()
        inputs = torch.empty(1, 4, 32, 32), torch.empty(1, dtype=torch.int64), torch.empty(1, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(*inputs)
    # The rest is what surrounds the blocks
    assert 0.98 < diffusion_cost(architecture("dit_s_2"), 256) / (counter.get_total_flops() / 2) < 1


@pytest.mark.parametrize("family", [*IMAGES[:3], *DIFFUSION], ids=lambda family: family.dense)
def test_named_models_have_limits_that_rise_with_the_share(family) -> None:
    if family.case.subject == "diffusion":
        pytest.importorskip("diffusers")
    values = [limit(family.case, share) for share in sorted(family.shares)]
    assert all(value is not None and 0.7 < value < 1 for value in values) and values == sorted(values)


def test_without_diffusers_its_models_have_no_limit(monkeypatch) -> None:
    monkeypatch.setattr(limits.importlib.util, "find_spec", lambda name: None)
    assert limit(DIFFUSION[0].case, 0.75) is None


def test_the_table_of_language_models_has_the_limit_in_the_next_column() -> None:
    def row(contender: str, share: float | None, ratio: float) -> Row:
        return Row(contender, share, share, ratio, ratio, ratio, ratio, ratio, ratio, 5)

    long = replace(BASE, length=8192)
    rows = (row("dense", None, 1.0), row("ours", 1 / 3, 0.6), row("ours", 1.0, 0.9))
    machine = Machine("CPU", 2, "2.14.1", "avx2", amx=False, bf16=False)
    results = [Result(long, rows), Result(replace(long, model="/models/other"), rows)]
    table = tables.subject_table("model", [Run(machine, results)])
    assert table is not None
    at = table.header.index("ours, 33%")
    assert table.header[at : at + 3] == ("ours, 33%", "limit, 33%", "ours, 100%")
    assert {cells[0].endswith("other"): cells[at + 1] for cells in table.rows} == {
        False: f"{limit(long, 1 / 3):.2f}",
        True: tables.NOTHING,
    }
    assert all(len(cells) == len(table.header) for cells in table.rows)


@pytest.mark.parametrize(
    "mode, lengths",
    [("prefill", {512, 128, 2048, 8192}), ("decode", {512, 128, 2048, 8192}), ("training", {256, 2048})],
)
def test_the_full_grid_has_long_texts(mode: str, lengths: set[int]) -> None:
    from benchmarks.runner import select

    assert {case.length for case in select(["model"], "full") if case.mode == mode} == lengths
