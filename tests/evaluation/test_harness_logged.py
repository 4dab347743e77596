"""Promise: lm-evaluation-harness's own command line knows our models and suites, and its logs give the same comparison."""

from __future__ import annotations

import json
import math
import shutil
import sys
from itertools import product
from pathlib import Path

import pytest
import yaml
from harness_cases import save_moh, write_tasks

from moh.cli import main
from moh.evaluation.harness import SUITES, evaluate_tasks, read_logged, suite, with_suites
from moh.evaluation.harness.registry import SUITE_FILES, read_suite

TASKS = ["tiny_choice:2", "tiny_last:0", "tiny_group"]
GROUP = {
    "group": "tiny_suite",
    "task": [{"task": "tiny_choice", "num_fewshot": 2}, {"task": "tiny_last", "num_fewshot": 0}],
    "metadata": {"version": 1.0, "scores": {"tiny_choice": {"metric": "acc", "label": "Choice"}}},
}


@pytest.fixture(scope="module")
def place(base_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tasks, a suite of them, and the logs of two models that the harness's own command asked."""
    import datasets.config
    import lm_eval.tasks
    from lm_eval.__main__ import cli_evaluate

    place = tmp_path_factory.mktemp("logged")
    write_tasks(place / "tasks")
    (place / "tasks" / "tiny_suite.yaml").write_text(yaml.safe_dump(GROUP))
    shutil.copytree(base_dir, place / "dense")
    save_moh(base_dir, place / "moh")
    manager = lm_eval.tasks.TaskManager

    def ours(include_path: str, **options: object) -> object:  # reading all of the harness's files takes a minute
        return manager(include_defaults=False, include_path=include_path, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", place / "datasets")
        patch.setattr(lm_eval.tasks, "TaskManager", ours)
        patch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)  # lists all packages of this machine
        for name, task in product(("dense", "moh"), ("tiny_suite", "tiny_group")):
            argv = ["run", "--model", "moh", "--model_args", f"pretrained={place / name}", "--device", "cpu"]
            argv += ["--tasks", task, "--include_path", str(place / "tasks"), "--log_samples"]
            argv += ["--output_path", str(place / "out" / name), "--batch_size", "4", "--seed", "1234"]
            patch.setattr(sys, "argv", ["lm-eval", *argv])
            cli_evaluate()
    return place


@pytest.fixture(scope="module")
def logged(place: Path):
    return read_logged({"dense": place / "out" / "dense", "MoH": place / "out" / "moh"}, TASKS)


def test_logs_give_the_comparison_that_our_own_run_gives(place: Path, logged, monkeypatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", place / "datasets")
    models = {"dense": place / "dense", "MoH": place / "moh"}
    own = evaluate_tasks(models, TASKS, include_paths=[place / "tasks"], batch_size=4, progress=False)
    for ours, theirs in zip(own.models, logged.models, strict=True):
        assert ours.share == theirs.share
        for one, other in zip(ours.scores, theirs.scores, strict=True):
            assert one.parts == other.parts and one.parts and one.value == pytest.approx(other.value)
            assert (one.task, one.shots, one.metric, one.questions) == (
                other.task, other.shots or 0, other.metric, other.questions)  # fmt: skip
    for task in range(len(TASKS)):
        assert own.difference(1, task) == logged.difference(1, task)
        assert not math.isnan(logged.difference(1, task).stderr)
    rows = [line.split(" | ")[0] for line in logged.to_markdown().splitlines()[2:7]]
    assert rows == ["| heads used", "| tiny_choice", "| tiny_last", "| tiny_group", "| average"]


def test_a_suites_file_says_which_score_counts(place: Path) -> None:
    file = str(place / "tasks" / "tiny_suite.yaml")
    result = read_logged([place / "out" / "dense"], file)
    assert [(score.label, score.metric) for score in result.models[0].scores] == [
        ("Choice", "acc"),
        ("tiny_last", "acc"),
    ]
    assert result.title == "tiny_suite"


def test_without_names_all_tasks_are_shown_and_groups_whole(place: Path) -> None:
    scores = read_logged([place / "out" / "dense"]).models[0].scores
    assert {score.task for score in scores} == {
        "tiny_choice",
        "tiny_last",
        "tiny_group",
    }  # tiny_fixed is in the group only


def test_the_command_compares_logs(place: Path, tmp_path: Path, capsys, logged) -> None:
    out = place / "out"
    argv = ["eval", "lm", str(out / "moh"), "--dense", str(out / "dense"), "--logged", "--tasks", *TASKS]
    assert main([*argv, "--output", str(tmp_path / "table")]) == 0
    assert capsys.readouterr().out in (tmp_path / "table" / "table.md").read_text()
    assert json.loads((tmp_path / "table" / "results.json").read_text())["models"][1]["share_of_heads"] == 0.5


@pytest.fixture
def copied(place: Path, tmp_path: Path) -> Path:
    shutil.copytree(place / "out", tmp_path / "out")
    return tmp_path / "out"


def _changed(file: Path, change) -> None:
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    change(lines)
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (lambda out: shutil.rmtree(out / "moh"), "holds no results_"),
        (lambda out: next(out.rglob("moh/*/samples_tiny_last*")).unlink(), "run lm-eval with --log_samples"),
        (lambda out: _changed(next(out.rglob("moh/*/samples_tiny_last*")), lambda rows: rows[0].update(doc_hash="x")),
         "model 'moh': task 'tiny_last' asked other questions than of 'dense'"),
        (lambda out: _changed(next(out.rglob("moh/*/results_*")), lambda rows: None), "is not a results file"),
        (lambda out: shutil.copytree(out / "dense", out / "moh" / "other"), "holds results of several models"),
    ],
    ids=["none", "no samples", "other questions", "damaged", "several models"],
)  # fmt: skip
def test_logs_that_do_not_compare_are_refused(copied: Path, fault, message: str) -> None:
    if "results file" in message:
        next(copied.rglob("moh/*/results_*")).write_text("[]")
    else:
        fault(copied)
    with pytest.raises(ValueError, match=message):
        read_logged([copied / "dense", copied / "moh"], ["tiny_last"])


@pytest.mark.parametrize(
    ("tasks", "message"),
    [(["tiny_write"], "no results of the task 'tiny_write'"), (["tiny_choice:5"], "asked with 0 and 2 shots, not 5")],
    ids=["missing", "shots"],
)
def test_tasks_that_were_not_asked_are_named(place: Path, tasks: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_logged([place / "out" / "dense"], tasks)


@pytest.mark.parametrize("name", SUITES)
def test_the_suites_are_groups_of_the_harness(name: str) -> None:
    group = yaml.safe_load((SUITE_FILES / f"{name}.yaml").read_text())
    assert group["group"] == name
    assert [(member.get("task") or member.get("group"), member["num_fewshot"]) for member in group["task"]] == [
        (task.name, task.shots) for task in suite(name)
    ]


def test_suites_are_found_by_name_unless_a_run_has_its_own_tasks() -> None:
    ours = ["--include_path", str(SUITE_FILES)]
    assert with_suites(["run", "--tasks", "paper14"]) == ["run", "--tasks", "paper14", *ours]
    assert with_suites(["--tasks", "paper14"]) == ["--tasks", "paper14", *ours]  # the harness's older form
    for argv in (["run", "--include_path", "mine"], ["run", "--include_path=mine"], ["ls", "tasks"], [], ["--help"]):
        assert with_suites(argv) == argv


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1]", "is not a group of tasks"),
        ("group: x", "is not a group of tasks"),
        ("group: x\ntask: [a]\nmetadata: {scores: {a: {metrik: acc}}}", "metrik"),
        (
            "group: x\ntask: [a]\nmetadata: {scores: {b: {metric: acc}}}",
            "metadata.scores names b, which the group does not",
        ),
    ],
    ids=["list", "no tasks", "field", "task"],
)
def test_a_file_that_is_no_suite_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "x.yaml").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_suite(tmp_path / "x.yaml")


@pytest.mark.parametrize("dtype", ["int8", "float"])
def test_the_model_of_the_harness_refuses_unknown_dtypes(place: Path, dtype: str) -> None:
    from lm_eval.api.registry import get_model

    with pytest.raises(ValueError, match=f"dtype must be one of auto, float32, bfloat16, float16, got '{dtype}'"):
        get_model("moh").create_from_arg_string(f"pretrained={place / 'moh'},dtype={dtype}")
