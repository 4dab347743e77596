"""Promises of the report of a conversion: it recommends what was measured to be best, says why, and shows every figure."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers", reason="the llm extra is not installed")
pytest.importorskip("matplotlib", reason="the plot extra is not installed")

import transformers

import moh
from moh.conversion.fitted import DROPPED_LINEAR, FIXED_HEADS, MIXED, ROUTED, Fitted
from moh.evaluation.conversion_measure import DECODE_TOKENS, measure_conversion, report_lengths
from moh.evaluation.conversion_page import Heading, Table, as_html, markdown, save_report
from moh.evaluation.conversion_report import Cell, ConversionReport, Ratio, Rise, Times
from moh.models.heads import total_of_share


def ratio(median: float, spread: float = 0.01) -> Ratio:
    return Ratio(median, median - spread, median + spread)


def cell(method: str, share: float, rise: float, prefill: dict[int, float], decode: float = 1.0) -> Cell:
    times = {length: Times(ratio(time), ratio(decode)) for length, time in prefill.items()}
    rises = {"news": Rise(rise, 0.2, share + 0.01), "novel": Rise(rise / 2, 0.1, share + 0.02)}
    return Cell(method, (3, 2), share, 1.0, rises, times)


def report(*cells: Cell) -> ConversionReport:
    counted = {512: {0.75: 0.06}, 8192: {0.75: 0.16}}
    return ConversionReport("tiny", {"news": 21.75, "novel": 26.3}, cells, counted, {"threads": 2, "dtype": "float32"})


def test_the_model_that_saves_most_time_within_what_is_tolerated_is_recommended() -> None:
    found = report(
        cell(ROUTED, 0.9, 1.0, {512: 1.05, 2048: 1.0, 8192: 0.95}),
        cell(ROUTED, 0.75, 3.0, {512: 1.02, 2048: 0.99, 8192: 0.81}),
        cell(ROUTED, 0.5, 12.0, {512: 0.95, 2048: 0.9, 8192: 0.6}),
        cell(FIXED_HEADS, 0.75, 15.0, {512: 0.9, 2048: 0.8, 8192: 0.7}),
    )
    assert found.recommended() == found.cells[1]
    assert found.recommendation() == (
        "Take routed heads at 75% (`moh convert --share 0.75`): perplexity rises by +3.0 ± 0.2 % on news and +1.5 ± 0.1 % on "
        "novel, within the 5 % that this page tolerates. Reading a prompt takes 0.81 of the dense model's time with 8,192 "
        "tokens and gains nothing with 512 and 2,048 tokens (1.02 and 0.99). Decoding a token gains nothing with 512, 2,048 "
        "and 8,192 tokens (1.00, 1.00 and 1.00). With fixed heads at 75% it rises by +15.0 ± 0.2 % on news and +7.5 ± 0.1 % "
        "on novel."
    )


def test_fixed_heads_are_recommended_where_they_cost_no_more() -> None:
    found = report(cell(ROUTED, 0.75, 3.0, {512: 1.0}), cell(FIXED_HEADS, 0.75, 3.0, {512: 0.8}))
    assert found.recommended() == found.cells[1]
    assert "`moh convert --share 0.75 --router fixed`" in found.recommendation()


@pytest.mark.parametrize(
    ("method", "router", "options"),
    [
        (ROUTED, "threshold", ""),
        (ROUTED, "linear", " --router linear"),
        (MIXED, "linear", " --router linear --layers mix"),
        (FIXED_HEADS, "linear", " --router fixed"),
        (DROPPED_LINEAR, "linear", " --layers drop"),
    ],
)
@pytest.mark.parametrize("total", [210, 202])
def test_the_recommended_command_makes_the_model_that_was_measured(method, router, options, total) -> None:
    found = dataclasses.replace(report(cell(method, total / 270, 3.0, {512: 0.8})), router=router)
    (words,) = re.findall("`moh convert (.+?)`", found.recommendation())
    share = words.split()[1]
    assert words == f"--share {share}{options}" and total_of_share(float(share), 30, 9) == total  # of SmolLM2-135M


@pytest.mark.parametrize(
    ("cells", "words"),
    [
        ([cell(ROUTED, 0.9, 6.0, {512: 0.5})], "Keep the dense model: all of the models lose more than 5 %"),
        ([cell(ROUTED, 0.9, 1.0, {512: 1.1})], "Keep the dense model: none .* noticeably faster with 512 tokens"),
        ([cell(ROUTED, 0.9, 1.0, {512: 0.985})], "Keep the dense model: none .* noticeably faster"),
        (
            [cell(ROUTED, 0.9, 1.0, {}), cell(ROUTED, 0.75, 2.0, {})],
            "No time was measured.* at 75% use the fewest heads",
        ),
        ([], "Nothing was measured yet"),
    ],
    ids=["loses", "slower", "hardly", "untimed", "nothing"],
)
def test_what_speaks_against_a_conversion_is_said(cells: list[Cell], words: str) -> None:
    found = report(*cells)
    assert re.search(words, found.recommendation())
    assert found.recommended() is None


def test_a_gain_within_the_spread_is_none() -> None:
    assert ratio(0.9).gains and not ratio(0.9, 0.2).gains and not ratio(0.99, 0.001).gains


def test_the_pages_show_every_figure(tmp_path: Path) -> None:
    found = report(
        cell(ROUTED, 0.75, 3.25, {512: 1.02, 8192: 0.81}, decode=0.93),
        cell(DROPPED_LINEAR, 0.75, 41.5, {}),
    )
    save_report(found, tmp_path)
    text, page = ((tmp_path / f"conversion_report.{kind}").read_text("utf-8") for kind in ("md", "html"))
    for words in (
        "+3.2 ± 0.2 (76%)",
        "+1.6 ± 0.1 (77%)",
        "the average over the tokens of each text",
        "+41.5 ± 0.2",
        "21.75 on news",
        "1.02 (1.01 to 1.03)",
        "0.93 (0.92 to 0.94)",
        "16%",
    ):
        assert words in text and words in page
    assert "+41.5 ± 0.2 (" not in text and "75% of all heads on average; perplexity" in text
    assert "routed heads (this model)" in text and "<b>Recommendation.</b>" in page
    pictures = re.findall(r"!\[.+\]\((.+)\)", text)
    assert len(pictures) == 2 and all((tmp_path / file).stat().st_size for file in pictures)
    assert page.count("data:image/png;base64,") == 2 and "http" not in page
    assert json.loads((tmp_path / "conversion_report.json").read_text())["recommendation"] == found.recommendation()


def test_the_page_fits_a_phone_and_follows_the_dark_scheme() -> None:
    page = as_html([Heading("a", 1), Table(("b",), [("1",)])])
    # Without it a phone lays the page out at 980 pixels and shrinks it.
    assert '<meta name="viewport" content="width=device-width, initial-scale=1">' in page
    style = page.split("<style>")[1].split("</style>")[0]
    palettes = re.findall(r":root\{(.+?)\}", style)
    assert "color-scheme:light dark" in palettes[0] and "prefers-color-scheme:dark" in style
    names = [set(re.findall(r"--\w+", palette)) for palette in palettes]
    assert len(names) == 2 and names[0] == names[1] == set(re.findall(r"var\((--\w+)\)", style))
    assert not re.search(r"#[0-9a-f]{3}", re.sub(r":root\{.+?\}", "", style))  # no colour of one scheme alone
    assert "<div><table>" in page and "div{overflow-x:auto}" in style


def test_names_are_text_and_no_markup() -> None:
    page = as_html([Heading("<b>", 1), "a < b, **c** and `d`", Table(("<i>",), [("&",)])])
    assert "<h1>&lt;b&gt;</h1>" in page and "a &lt; b, <b>c</b> and <code>d</code>" in page
    assert "<th>&lt;i&gt;</th>" in page and "<td>&amp;</td>" in page
    assert "<th>" not in as_html([Table(("", ""), [("a", "b")])])  # a table without a head has no empty one
    assert markdown([Heading("b"), Table(("i",), [("1",)])]) == "## b\n\n| i |\n| --- |\n| 1 |\n"


@pytest.fixture(scope="module")
def fitted() -> Fitted:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, pad_token_id=0, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    return Fitted(transformers.LlamaForCausalLM(config).eval(), torch.randint(64, (24, 16)))


def test_a_measurement_compares_the_methods_on_every_text_and_keeps_what_it_has(fitted: Fitted) -> None:
    heldout = {"news": torch.randint(64, (3, 16)), "novel": torch.randint(64, (2, 16))}
    kept: list[ConversionReport] = []
    found = measure_conversion(
        fitted, ROUTED, fitted.make(ROUTED, 6), heldout, name="tiny", lengths=[8, 60], shares=(0.5,), repeats=1,
        keep=kept.append, progress=False,
    )  # fmt: skip
    assert found.cells[0].method == ROUTED and found.cells[0].share == 0.75 and found.router == "threshold"
    assert any(rise.share != found.cells[0].share for rise in found.cells[0].rises.values())  # texts of another kind
    shares = {(c.method, sum(c.used)) for c in found.cells}
    assert {(ROUTED, 6), (ROUTED, 4), (FIXED_HEADS, 6), (FIXED_HEADS, 4), (DROPPED_LINEAR, 4)} <= shares
    assert len(shares) == len(found.cells)  # what comes out twice is shown once
    for c in found.cells:
        assert set(c.rises) == set(heldout) and all(rise.stderr > 0 for rise in c.rises.values())
        for text, rise in c.rises.items():
            made = fitted.make(c.method, sum(c.used))
            with moh.record_routing(made.model) as routing:
                made.model(heldout[text])
            assert rise.share == pytest.approx(routing.share())
            assert c.method == ROUTED or rise.share == pytest.approx(c.share)
        assert set(c.times) == ({8, 60} if c.worst <= 20 or c is found.cells[0] else set())
    dropped = next(c for c in found.cells if c.method == DROPPED_LINEAR and sum(c.used) == 4)
    assert dropped.cache == 0.5 and found.cells[0].cache == 1
    # After each model, and after each length
    assert [len(k.cells) for k in kept] == [*range(1, len(found.cells) + 1), len(found.cells), len(found.cells)]
    assert [k.lengths for k in kept[-3:]] == [[], [8], [8, 60]]


def test_one_block_of_a_text_has_no_standard_error(fitted: Fitted) -> None:
    with pytest.raises(ValueError, match="at least 2 blocks of each text for a standard error, got 1 of news"):
        measure_conversion(fitted, ROUTED, fitted.make(ROUTED, 6), {"news": torch.ones(1, 8).long()}, name="tiny")


@pytest.mark.parametrize(
    ("config", "given", "expected"),
    [
        (transformers.LlamaConfig(max_position_embeddings=8192), None, [512, 2048, 8192]),
        (transformers.LlamaConfig(max_position_embeddings=1024), None, [512, 1024]),
        (transformers.GPT2Config(n_positions=1024), None, [512, 1024 - DECODE_TOKENS]),
        (transformers.LlamaConfig(max_position_embeddings=64), [9, 3, 9], [3, 9]),
    ],
    ids=["long", "short", "learned", "given"],
)
def test_lengths_are_those_that_the_model_supports(config, given, expected) -> None:
    assert report_lengths(config, given) == expected


@pytest.mark.parametrize("length", [0, 65])
def test_a_length_out_of_reach_is_refused(length: int) -> None:
    config = transformers.LlamaConfig(max_position_embeddings=64)
    with pytest.raises(ValueError, match=f"lengths must be between 1 and 64 for this model, got {length}"):
        report_lengths(config, [length])
