"""Timing, resuming and reporting of the benchmarks, with made-up numbers: no test measures speed."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import report
from benchmarks.__main__ import main
from benchmarks.cases import Case, Contender
from benchmarks.results import Machine, Result, Run
from benchmarks.runner import measure_missing, select
from benchmarks.tables import missed
from benchmarks.targets import TARGETS, judge
from benchmarks.timing import MIN_LONG_ROUNDS, MIN_ROUNDS, Row, rows, time_in_turns

MACHINE = Machine("Some CPU (R) 9000", 2, "2.0", "avx2", amx=False, bf16=False)


def row(contender: str, share: float | None, ratio: float) -> Row:
    return Row(
        contender,
        share,
        share,
        ratio / 1e3,
        ratio / 1e3,
        ratio / 1e3,
        ratio,
        round(ratio - 0.01, 4),
        round(ratio + 0.01, 4),
        5,
    )


def result(case: Case, *ours: float) -> Result:
    shares = zip((0.5, 1.0), ours, strict=False)
    return Result(
        case, (row("dense", None, 1.0), *(row("ours", s, r) for s, r in shares)), "abc1234", "2025-01-02T03:04:05"
    )


CASES = [Case("core", "forward", length=length) for length in (128, 256, 512)]


def test_contenders_take_turns_and_a_different_one_goes_first_in_each_round() -> None:
    calls: list[str] = []

    def slow(name: str) -> None:
        calls.append(name)
        time.sleep(0.003)

    contenders = [Contender(name, lambda name=name: slow(name)) for name in ("dense", "ours")]  # type: ignore[misc]
    measured = time_in_turns(contenders, seconds=0)
    assert [r.rounds for r in measured] == [MIN_ROUNDS, MIN_ROUNDS]
    assert calls[4:] == ["dense", "ours", "ours", "dense"] * 2 + ["dense", "ours"]


def test_long_rounds_are_fewer_and_the_first_one_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.timing.LONG_ROUND_SECONDS", 0.4)
    calls: list[str] = []
    contenders = [
        Contender(name, lambda name=name: (calls.append(name), time.sleep(0.21))) for name in ("dense", "ours")
    ]  # type: ignore[misc]
    assert [r.rounds for r in time_in_turns(contenders, seconds=0)] == [MIN_LONG_ROUNDS, MIN_LONG_ROUNDS]
    assert calls == ["dense", "ours", "ours", "dense", "dense", "ours"]


def test_ratios_are_taken_within_a_round() -> None:
    contenders = [Contender("dense", int), Contender("ours", int, 0.5, 0.5)]
    ours = rows(contenders, [[1.0, 2.0, 4.0], [0.5, 1.0, 2.0]], 0)[1]
    assert (ours.median, ours.ratio, ours.ratio_low, ours.ratio_high) == (1.0, 0.5, 0.5, 0.5)


def test_timing_without_the_baseline_is_refused() -> None:
    with pytest.raises(ValueError, match=r"baseline must be .*'ours'.* got 'dense'"):
        time_in_turns([Contender("ours", int)], seconds=0)


def test_resuming_measures_only_what_is_missing_and_keeps_each_result_at_once(tmp_path: Path) -> None:
    save, seen = tmp_path / "run.json", []

    def measure(case: Case) -> list[Row]:
        seen.append(case.length)
        if case.length == 512 and seen.count(512) == 1:
            raise KeyboardInterrupt
        return [row("dense", None, 1.0)]

    with pytest.raises(KeyboardInterrupt):
        measure_missing(CASES, Run(MACHINE), save, measure)
    assert Run.load(save).measured() == set(CASES[:2])
    assert measure_missing(CASES, Run.load(save), save, measure) == 0
    assert seen == [128, 256, 512, 512]
    assert Run.load(save).measured() == set(CASES)


def test_resuming_measures_a_case_at_other_shares_again(tmp_path: Path) -> None:
    run, other = Run(MACHINE, [result(CASES[0], 0.4, 0.9)]), replace(CASES[0], shares=(0.6,))
    assert measure_missing(CASES[:1], run, tmp_path / "run.json", lambda case: pytest.fail("measured already")) == 0
    assert measure_missing([other], run, tmp_path / "run.json", lambda case: [row("dense", None, 1.0)]) == 0
    assert [r.case for r in run.results] == [other]


def test_a_case_that_fails_is_kept_with_its_reason_and_tried_again(tmp_path: Path) -> None:
    def fail(case: Case) -> list[Row]:
        raise RuntimeError("out of\nmemory")

    run = Run(MACHINE)
    assert measure_missing(CASES[:1], run, tmp_path / "run.json", fail) == 1
    assert Run.load(tmp_path / "run.json").results[0].error == "out of memory"
    assert run.measured() == set()


def test_results_survive_the_file(tmp_path: Path) -> None:
    run = Run(MACHINE, [result(CASES[0], 0.4, 0.9), result(replace(CASES[1], shares=(1 / 3,)), 0.5)])
    run.save(tmp_path / "run.json")
    assert Run.load(tmp_path / "run.json") == run
    assert [p.name for p in tmp_path.iterdir()] == ["run.json"]


def test_a_file_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "other.json").write_text('{"machine": {}}')
    with pytest.raises(ValueError, match=r"other\.json holds no results"):
        Run.load(tmp_path / "other.json")


def test_a_new_run_replaces_its_subjects_a_part_of_one_only_its_cases() -> None:
    decode = result(Case("decode", "decode"), 0.5)
    old = Run(MACHINE, [result(CASES[0], 0.4), result(CASES[1], 0.4), decode])
    new = Run(MACHINE, [result(CASES[0], 0.3)])
    assert old.merged(new).results == [decode, *new.results]
    assert old.merged(new, part=True).results == [old.results[1], decode, *new.results]
    assert old.merged(Run(replace(MACHINE, threads=4), new.results)).results == new.results


def test_a_language_model_of_ones_own_stays_beside_the_random_ones() -> None:
    own, random = (result(Case("model", "decode", model=model), 0.5) for model in ("dir", None))
    again = Run(MACHINE, [random])
    assert Run(MACHINE, [own, random]).merged(again).results == [own, random]
    assert Run(MACHINE, [own, random]).merged(Run(MACHINE, [own])).results == [random, own]


def test_a_target_is_missed_if_one_case_misses_it() -> None:
    run = Run(MACHINE, [result(CASES[1], 0.20, 0.9), result(CASES[2], 0.46, 0.9)])
    reached = judge(TARGETS[0], run)
    assert [value for value, _, _ in reached.values] == [0.20, 0.46]
    assert reached.aims == 1 and [case for _, case in reached.missed] == [CASES[2]]
    assert missed([run])[0] == f"{TARGETS[0].what}, {TARGETS[0].must:g}: A 0.46 ({CASES[2].label})"
    faster = Run(MACHINE, [result(CASES[1], 0.20, 0.9), result(CASES[2], 0.44, 0.9)])
    worse = Run(MACHINE, [result(CASES[1], 0.50, 0.9), result(CASES[2], 0.48, 0.9)])
    assert missed([faster, worse, run])[0].endswith(f": B 0.50 ({CASES[1].label}), C 0.46 ({CASES[2].label})")


def test_aims_depend_on_the_machine_and_the_dtype() -> None:
    target = next(t for t in TARGETS if t.aim_bfloat16 == 0.30)
    case = replace(CASES[2], dtype="bfloat16")
    assert target.aim_of(MACHINE, case) == 0.30
    assert target.aim_of(MACHINE, CASES[2]) == 0.55
    assert target.aim_of(replace(MACHINE, amx=True), case) == 0.70


def test_page_shows_all_cpus_side_by_side_the_misses_and_the_remarks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report, "kernels_changed", lambda: "2025-01-01")
    first = Run(MACHINE, [result(case, 0.5, 0.9) for case in CASES])
    second = Run(
        replace(MACHINE, cpu="Other CPU"), [result(CASES[2], 0.25, 0.5), Result(CASES[0], (), error="too slow")]
    )
    (tmp_path / f"{MACHINE.slug}.md").write_text("It has no large registers.")
    report.write_page([first, second], tmp_path / "speed.md", tmp_path / "images", tmp_path)
    page = (tmp_path / "speed.md").read_text()
    lines = page.splitlines()
    index = next(i for i, line in enumerate(lines) if line.startswith("| forward, B1 H8 N512 D64 float32 | A |"))
    assert "| 0.50 ± 0.01 | 0.90 ± 0.01 |" in lines[index]
    assert (
        lines[index + 1].startswith("| forward, B1 H8 N512 D64 float32 | B |") and "| 0.25 ± 0.01 |" in lines[index + 1]
    )
    assert "failed: too slow" in page
    assert "**must missed** in 2 of 2, aim reached in 0 of 2 | 0.25; must reached, aim reached in 1 of 1 |" in page
    assert any(
        line.startswith("- core, forward, float32, a = 0.5, 0.45: A 0.50 (B1 H8 N512 D64 float32)") for line in lines
    )
    assert "It has no large registers." in page
    assert "](images/speed_share.png)" in page and (tmp_path / "images" / "speed_share.png").stat().st_size > 10_000


@pytest.mark.parametrize("option", [("--dtype", "bfloat16"), ("--model", "smollm2-moh")], ids=lambda words: words[0])
def test_options_of_a_language_model_are_refused_without_one(option: tuple[str, str], capsys) -> None:
    assert main(["core", "decode", "--list", *option]) == 2
    message = f"{' '.join(option)} is for the subject model alone, got core, decode: add model or leave it out"
    assert capsys.readouterr().err == f"benchmarks: {message}\n"


def test_choosing_cases_by_subject_and_text() -> None:
    found = select(["core", "memory"], "default", only="bfloat16 causal")
    assert found and all(case.dtype == "bfloat16" and case.causal for case in found)
