"""Suites of tasks by name, as tables: the task's name in lm-evaluation-harness, its shots and the score that counts.

Which score that is, and why, is told in docs/evaluation.md. Not for loading tasks (`moh.evaluation.harness.registry`).
"""

from __future__ import annotations

from dataclasses import dataclass

PREFERRED_METRICS = ("acc_norm", "acc", "exact_match", "f1")
"""Scores to look for, in this order, in a task that is named without one; if it has none of them, its first counts."""

_PERCENT = ("acc", "acc_norm", "acc_bytes", "exact_match", "f1")


@dataclass(frozen=True)
class HarnessTask:
    """One row of a suite.

    Attributes:
        name: of the task, or the group of tasks, in the harness.
        shots: solved examples before each question; None takes what the task says itself.
        metric: the score that counts, as the harness calls it; None takes the first of `PREFERRED_METRICS` it has.
        filter: how the answer is cut from the text that the model wrote; None takes the task's first.
        label: what tables call it; None takes its name.
        folder: where the harness keeps it, below its folder of tasks; None looks through all of them.
    """

    name: str
    shots: int | None = None
    metric: str | None = None
    filter: str | None = None
    label: str | None = None
    folder: str | None = None

    @property
    def title(self) -> str:
        """What tables call it."""
        return self.label or self.name


def is_percent(metric: str) -> bool:
    """Whether a score is a share, which tables show in percent and which is averaged with others."""
    return metric in _PERCENT


SUITES: dict[str, tuple[HarnessTask, ...]] = {
    # The 14 tasks on which the paper compares MoH-LLaMA3-8B with LLaMA3-8B, section 4.4
    "paper14": (
        HarnessTask("mmlu", 5, "acc", label="MMLU", folder="mmlu/default"),
        HarnessTask("ceval-valid", 5, "acc", label="C-Eval", folder="ceval"),
        HarnessTask("cmmlu", 5, "acc", label="CMMLU", folder="cmmlu"),
        HarnessTask("gsm8k", 8, "exact_match", filter="strict-match", label="GSM8K", folder="gsm8k"),
        HarnessTask("truthfulqa_mc2", 0, "acc", label="TruthfulQA", folder="truthfulqa"),
        HarnessTask("hellaswag", 10, "acc_norm", label="HellaSwag", folder="hellaswag"),
        HarnessTask("logiqa", 0, "acc_norm", label="LogiQA", folder="logiqa"),
        HarnessTask("boolq", 32, "acc", label="BoolQ", folder="super_glue/boolq"),
        HarnessTask("lambada_openai", 0, "acc", label="LAMBADA", folder="lambada"),
        HarnessTask("sciq", 0, "acc_norm", label="SciQ", folder="sciq"),
        HarnessTask("piqa", 0, "acc_norm", label="PIQA", folder="piqa"),
        HarnessTask("winogrande", 0, "acc", label="WinoGrande", folder="winogrande"),
        HarnessTask("nq_open", 32, "exact_match", label="NaturalQuestions", folder="nq_open"),
        HarnessTask("arc_challenge", 25, "acc_norm", label="ARC-Challenge", folder="arc"),
    ),
    # The six on which it compares models trained from scratch, section 4.3
    "scratch6": (
        HarnessTask("sciq", 0, "acc_norm", label="SciQ", folder="sciq"),
        HarnessTask("piqa", 0, "acc_norm", label="PIQA", folder="piqa"),
        HarnessTask("winogrande", 0, "acc", label="WinoGrande", folder="winogrande"),
        HarnessTask("openbookqa", 0, "acc_norm", label="OpenBookQA", folder="openbookqa"),
        HarnessTask("logiqa", 0, "acc_norm", label="LogiQA", folder="logiqa"),
        HarnessTask("truthfulqa_mc2", 0, "acc", label="TruthfulQA", folder="truthfulqa"),
    ),
    # Made on this machine from texts of package indexes: `moh.evaluation.harness.local`
    "local": (
        HarnessTask("moh_definitions", 0, "acc_norm", label="Definitions"),
        HarnessTask("moh_kinds", 0, "acc_norm", label="Kinds"),
        HarnessTask("moh_opposites", 5, "exact_match", label="Opposites"),
        HarnessTask("moh_last_words", 0, "acc", label="Last words"),
        HarnessTask("moh_next_sentences", 0, "acc_norm", label="Next sentences"),
    ),
}
"""The suites by name."""

LOCAL_SUITE = "local"


def suite(name: str) -> tuple[HarnessTask, ...]:
    """The tasks of a suite.

    Raises:
        ValueError: there is none of that name.
    """
    if name not in SUITES:
        raise ValueError(f"suite must be one of {', '.join(SUITES)}, got {name!r}")
    return SUITES[name]


def parse_task(text: str) -> HarnessTask:
    """A task as the command line names it: NAME or NAME:SHOTS. What the suites know of it, they say.

    Raises:
        ValueError: the shots are no number of at least 0, or there is no name.
    """
    name, colon, shots = text.partition(":")
    if not name or (colon and not shots.isdecimal()):
        raise ValueError(f"tasks must be NAME or NAME:SHOTS with shots of at least 0, got {text!r}")
    known = next((task for tasks in SUITES.values() for task in tasks if task.name == name), HarnessTask(name))
    wanted = int(shots) if colon else None
    return HarnessTask(name, wanted, known.metric, known.filter, known.label, known.folder)
