"""Language models on the tasks of lm-evaluation-harness, dense and MoH side by side (extra `eval`).

    result = evaluate_tasks({"dense": "base", "MoH": "converted"}, "paper14", batch_size=8, output_dir="scores")
    print(result.to_markdown())

"paper14" is one of the suites in `SUITES`. `read_logged` makes the same comparison from runs of the harness's own command
line, which knows our models as `moh` and the suites as groups once this package is imported (`with_suites`).
"""

from moh._extras import require

require("transformers", extra="eval")
require("lm_eval", extra="eval")

from moh._processes import processes
from moh.evaluation.harness.command import with_suites
from moh.evaluation.harness.evaluate import DTYPES, evaluate_tasks
from moh.evaluation.harness.logged import read_logged
from moh.evaluation.harness.registry import SUITES, HarnessTask, parse_task, suite
from moh.evaluation.harness.results import ModelScores, TaskEvaluation
from moh.evaluation.harness.runner import LoadedModel
from moh.evaluation.harness.scores import Estimate, Part, TaskScore

__all__ = [
    "DTYPES",
    "SUITES",
    "Estimate",
    "HarnessTask",
    "LoadedModel",
    "ModelScores",
    "Part",
    "TaskEvaluation",
    "TaskScore",
    "evaluate_tasks",
    "parse_task",
    "processes",
    "read_logged",
    "suite",
    "with_suites",
]
