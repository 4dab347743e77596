"""The results on disk: one JSON file per CPU, and a partial one during a run. Files are written whole or not at all."""

from __future__ import annotations

import datetime
import json
import re
import subprocess
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.cases import Case
from benchmarks.timing import Row
from moh._files import write_text
from moh.attention import cpu
from moh.evaluation.speed import cpu_name


@dataclass(frozen=True)
class Machine:
    """The machine of a run.

    Attributes:
        cpu: the processor's name.
        threads: of torch.
        torch: its version.
        instruction_set: of our kernels.
        amx: whether the processor has matrix units for bfloat16 (AMX).
        bf16: whether it has bfloat16 dot products.
    """

    cpu: str
    threads: int
    torch: str
    instruction_set: str
    amx: bool
    bf16: bool

    @property
    def slug(self) -> str:
        """CPU and instruction set as a file name: results of two instruction sets never replace each other."""
        return re.sub(r"[^a-z0-9]+", "-", f"{self.cpu} {self.instruction_set}".lower()).strip("-")


@dataclass(frozen=True)
class Result:
    """The measurement of one case, or why there is none.

    Attributes:
        case: what was measured.
        rows: one per contender.
        commit: of the code, "-dirty" if it had changes; None outside a repository.
        date: of the measurement, ISO 8601.
        error: why there are no rows.
    """

    case: Case
    rows: tuple[Row, ...]
    commit: str | None = None
    date: str = ""
    error: str | None = None

    def row(self, contender: str, share: float | None = None) -> Row | None:
        """The contender's row at a share, None if it wasn't measured."""
        return next((r for r in self.rows if r.contender == contender and r.share == share), None)


@dataclass
class Run:
    """All results of one CPU."""

    machine: Machine
    results: list[Result] = field(default_factory=list)

    def measured(self) -> set[Case]:
        """Cases that need not be measured again; the same one at other shares must be."""
        return {r.case for r in self.results if r.error is None}

    def add(self, result: Result) -> None:
        """Add a result, replacing an older one of the same case."""
        self.results = [r for r in self.results if r.case.key != result.case.key] + [result]

    def merged(self, new: Run, *, part: bool = False) -> Run:
        """The new run and the rest of this one: other subjects and other language models, or all other cases if it is a `part`.

        If the machine was set up differently, only the new run remains: one file has one set-up.
        """
        if self.machine != new.machine:
            return new

        def replaced(case: Case) -> object:
            return case.key if part else (case.subject, case.model if case.subject == "model" else None)

        measured = {replaced(r.case) for r in new.results}
        return Run(new.machine, [*(r for r in self.results if replaced(r.case) not in measured), *new.results])

    def save(self, path: Path) -> None:
        """Write JSON, whole or not at all."""
        text = json.dumps({"machine": asdict(self.machine), "results": [_dumped(r) for r in self.results]}, indent=1)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, _compact_rows(text) + "\n")

    @classmethod
    def load(cls, path: Path) -> Run:
        """Read what `save` wrote.

        Raises:
            ValueError: the file has another content.
        """
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            results = [
                Result(
                    Case.from_dict(r["case"]),
                    tuple(Row(**row) for row in r["rows"]),
                    r["commit"],
                    r["date"],
                    r["error"],
                )
                for r in data["results"]
            ]
            return cls(Machine(**data["machine"]), results)
        except (KeyError, TypeError, json.JSONDecodeError) as error:
            raise ValueError(f"{path} holds no results of these benchmarks: {error!r}") from None


def this_machine() -> Machine:
    """The machine as it is set up now.

    Raises:
        moh.attention.cpu.BuildError: the kernels could not be built.
    """
    capabilities = torch.cpu.get_capabilities()
    return Machine(
        cpu=cpu_name(),
        threads=torch.get_num_threads(),
        torch=torch.__version__,
        instruction_set=cpu.instruction_set(),
        amx=bool(capabilities.get("amx_bf16")),
        bf16=bool(capabilities.get("avx512_bf16")),
    )


def commit() -> str | None:
    """The commit of the code that runs."""
    return _git(Path(__file__).parent, "describe", "--always", "--dirty", "--exclude=*") or None


def kernels_changed() -> str:
    """When the CPU kernels' sources changed last, ISO 8601 in UTC; empty where git can't tell.

    Uncommitted changes count as now, commits of `.git-blame-ignore-revs` (moves, names and comments) don't count.
    """
    root = Path(__file__).parents[1]
    sources = ("--", "src/moh/attention/cpu/csrc")
    if _git(root, "status", "--porcelain", *sources):
        return now()
    ignored = (root / ".git-blame-ignore-revs").read_text(encoding="utf-8").split()
    commits = (line.split() for line in _git(root, "log", "--format=%H %ct", *sources).splitlines())
    seconds = next((int(time) for commit, time in commits if commit not in ignored), None)
    return "" if seconds is None else datetime.datetime.fromtimestamp(seconds, datetime.UTC).isoformat()


def _git(root: Path, *words: str) -> str:
    """What git prints; empty where it fails."""
    try:
        return subprocess.run(["git", *words], cwd=root, capture_output=True, text=True, check=False).stdout.strip()
    except OSError:
        return ""


def now() -> str:
    """Date and time, to the second."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def _dumped(result: Result) -> dict[str, Any]:
    """Plain data, numbers to five digits: more would be noise."""
    data = asdict(result)
    data["rows"] = [
        {
            name: float(f"{value:.5g}") if isinstance(value, float) and name != "share" else value
            for name, value in r.items()
        }
        for r in data["rows"]
    ]
    return data


def _compact_rows(text: str) -> str:
    """One line per innermost object or list, so that the file can be read and compared."""
    return re.sub(r"[{\[][^{}\[\]]*[}\]]", lambda found: re.sub(r"\s*\n\s*", " ", found.group()), text)
