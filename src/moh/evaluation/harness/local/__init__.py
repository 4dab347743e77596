"""Local tasks: the suite "local", made on this machine from texts that package indexes hold.

`make_local_tasks` makes the same kinds of questions from other texts. Not for tasks of the harness itself.
"""

from moh.evaluation.harness.local.make import local_tasks, make_local_tasks

__all__ = ["local_tasks", "make_local_tasks"]
