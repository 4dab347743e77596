"""`python -m moh.evaluation.harness ARGS ...`: lm-evaluation-harness's own command with our models and suites."""

from __future__ import annotations

import sys

from lm_eval.__main__ import cli_evaluate

from moh.evaluation.harness.command import with_suites

if __name__ == "__main__":
    sys.argv[1:] = with_suites(sys.argv[1:])
    cli_evaluate()
