"""Promise: every task of every suite exists in the harness with its shots and score; the paper's tables are complete."""

from __future__ import annotations

import pytest

from moh.evaluation.harness import (
    SUITES,
    HarnessTask,
    ModelScores,
    TaskEvaluation,
    TaskScore,
    parse_task,
    registry,
    suite,
)
from moh.evaluation.harness.registry import TaskRegistry

HUB_TASKS = {task.name: task for name in ("paper14", "scratch6") for task in SUITES[name]}


@pytest.fixture(scope="module")
def found() -> TaskRegistry:
    """Tasks of the folders that the suites name; asserts that none is missing, as then all files would be read."""
    with pytest.MonkeyPatch.context() as patch:
        original = registry.TaskManager

        def only_folders(*, include_defaults: bool = True, **options: object) -> object:
            assert not include_defaults, "a task is not in the folder that its suite names"
            return original(include_defaults=False, **options)

        patch.setattr(registry, "TaskManager", only_folders)
        return TaskRegistry(list(HUB_TASKS.values()))


def configurations(found: TaskRegistry, name: str) -> list[dict]:
    """Configurations of a task or of all tasks in a group."""
    entry = found.manager.task_index[name]
    children = registry._children(entry)
    return [config for child in children for config in configurations(found, child)] if children else [entry.cfg]


@pytest.mark.parametrize("task", HUB_TASKS.values(), ids=HUB_TASKS)
def test_a_suites_task_is_in_the_harness_with_its_score(found: TaskRegistry, task: HarnessTask) -> None:
    entry = found.manager.task_index[task.name]
    parts = configurations(found, task.name)
    for part in parts:
        metrics = [metric["metric"] for metric in part["metric_list"]]
        assert task.metric in metrics
        filters = [filter["name"] for filter in part.get("filter_list") or []]
        assert task.filter is None or task.filter in filters
        if task.shots:  # shots are allowed, and there is data for them
            assert part.get("num_fewshot") != 0
            assert part.get("fewshot_split") or part.get("training_split") or part.get("validation_split")
    if len(parts) > 1:
        assert task.metric in [joined["metric"] for joined in entry.cfg["aggregate_metric_list"]]


@pytest.mark.parametrize(("name", "parts"), [("mmlu", 57), ("ceval-valid", 52), ("cmmlu", 67), ("sciq", 1)])
def test_groups_hold_all_their_tasks(found: TaskRegistry, name: str, parts: int) -> None:
    assert len(configurations(found, name)) == parts


def test_the_papers_tasks_and_shots() -> None:
    assert {task.title: task.shots for task in suite("paper14")} == {
        "MMLU": 5, "C-Eval": 5, "CMMLU": 5, "GSM8K": 8, "TruthfulQA mc1": 0, "TruthfulQA mc2": 0, "HellaSwag": 10,
        "LogiQA": 0, "BoolQ": 32,
        "LAMBADA": 0, "SciQ": 0, "PIQA": 0, "WinoGrande": 0, "NaturalQuestions": 32, "ARC-Challenge": 25,
    }  # fmt: skip
    six = [task.title for task in suite("scratch6")]
    assert six == ["SciQ", "PIQA", "WinoGrande", "OpenBookQA", "LogiQA", "TruthfulQA mc1", "TruthfulQA mc2"]
    assert {task.shots for task in suite("scratch6")} == {0}


def test_both_scores_of_truthfulqa_are_shown_and_count_as_one_task() -> None:
    for name, tasks in (("paper14", 14), ("scratch6", 6)):
        weights = {task.name: task.weight for task in suite(name)}
        assert (weights["truthfulqa_mc1"], weights["truthfulqa_mc2"]) == (0.5, 0.5)
        assert sum(weights.values()) == tasks
    assert parse_task("truthfulqa_mc1").weight == 1
    values = {"a": (0.8, 1.0), "mc1": (0.2, 0.5), "mc2": (0.4, 0.5)}  # value, weight
    models = tuple(
        ModelScores(
            label, label, 1.0, tuple(_score(name, value + more, weight) for name, (value, weight) in values.items())
        )
        for label, more in (("dense", 0.0), ("MoH", 0.1))
    )
    result = TaskEvaluation("paper14", models, None, {}, "a machine")
    assert result.average(0).value == pytest.approx((0.8 + (0.2 + 0.4) / 2) / 2)
    assert result.average(0).stderr == pytest.approx(0.01 * (1 + 0.5**2 + 0.5**2) ** 0.5 / 2)
    assert result.average_difference(1).value == pytest.approx(0.1)


def _score(name: str, value: float, weight: float) -> TaskScore:
    return TaskScore(name, name, 0, "acc", "none", value, 0.01, 100, 0, (), {}, weight)


def test_a_task_by_name_keeps_what_its_suite_knows_of_it() -> None:
    assert parse_task("gsm8k:4") == HarnessTask("gsm8k", 4, "exact_match", "strict-match", "GSM8K", "gsm8k")
    assert parse_task("sciq").shots is None
    assert parse_task("mine:0") == HarnessTask("mine", 0)


@pytest.mark.parametrize("text", ["", ":3", "sciq:", "sciq:-1", "sciq:few"])
def test_other_names_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="tasks must be NAME or NAME:SHOTS with shots of at least 0, got"):
        parse_task(text)
