"""What the demo found, as one JSON file, one Markdown page and a table on the terminal.

Only puts numbers into words and files; `pipeline` measures them.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from re import fullmatch

from moh._files import write_text
from moh.evaluation import PerplexityResult, Rate, SpeedReport

FILES = ("report.json", "report.md", "head_load.csv", "head_load.png", "head_load.svg", "losses.png", "losses.svg")
"""What a demo writes next to its model."""

_TITLE = "# A pretrained language model with Mixture-of-Head attention"


@dataclass
class ModelRow:
    """One model of the table.

    Attributes:
        name: what was done to it.
        share: mean share of heads that a token uses, measured on the held-out text.
        perplexity: on the held-out text.
        loss_rise: mean difference of the loss, in nats per token, to the row that it is compared with.
        rise_stderr: standard error of that difference, over blocks (paired).
        compared_with: name of that row; None for the row that others are compared with.
    """

    name: str
    share: float
    perplexity: float
    loss_rise: float = 0.0
    rise_stderr: float = 0.0
    compared_with: str | None = None

    @property
    def above(self) -> float:
        """Perplexity above that of the row it is compared with, in percent."""
        return 100 * math.expm1(self.loss_rise)


def compared(
    name: str, share: float, result: PerplexityResult, base: ModelRow, base_result: PerplexityResult
) -> ModelRow:
    """A row whose loss is compared with another's, block by block."""
    differences = [a - b for a, b in zip(result.block_losses, base_result.block_losses, strict=True)]
    n = len(differences)
    mean = sum(differences) / n
    variance = sum((d - mean) ** 2 for d in differences) / max(n - 1, 1)
    return ModelRow(name, share, result.perplexity, mean, math.sqrt(variance / n), base.name)


@dataclass
class DemoReport:
    """Everything that the demo measured."""

    base_model: str
    text: str
    licence: str
    heldout_tokens: int
    calibration_tokens: int
    tuning_tokens: int
    steps: int
    precision: str
    cpu: str
    threads: int
    versions: dict[str, str]
    rows: list[ModelRow] = field(default_factory=list)
    layer_shares: list[float] = field(default_factory=list)
    speed: SpeedReport | None = None
    losses: dict[str, list[tuple[int, float]]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    sample: dict[str, str] = field(default_factory=dict)

    def markdown(self) -> str:
        """The report as a page; it refers to the pictures next to it."""
        lines = [
            _TITLE,
            "",
            f"Model: {self.base_model}. Text: {self.text} ({self.licence}), {self.heldout_tokens:,} held-out tokens; "
            f"calibrated on {self.calibration_tokens:,} tokens, tuned on {self.tuning_tokens:,} tokens in {self.steps} steps "
            f"({self.precision}).",
            f"Machine: {self.cpu}, {self.threads} threads; "
            + ", ".join(f"{name} {version}" for name, version in self.versions.items())
            + f". Whole run: {sum(self.seconds.values()) / 60:.1f} minutes.",
            "",
            *self.quality_table(),
            "",
            "± is the standard error of the paired difference over blocks of the held-out text, one run.",
            "",
            *self.speed_table(),
            "",
            "Share of heads used per layer: " + " ".join(f"{share:.2f}" for share in self.layer_shares),
            "",
            "![Training loss](losses.png)",
            "",
            "![Head load](head_load.png)",
            "",
            "## What the tuned MoH model writes",
            "",
        ]
        for prompt, text in self.sample.items():
            lines += [f"**{prompt}**{text}".replace("\n", " "), ""]
        return "\n".join(lines)

    def quality_table(self) -> list[str]:
        """Held-out perplexity of every model, as Markdown."""
        lines = ["| model | heads used | held-out perplexity | against |", "| --- | --- | --- | --- |"]
        for row in self.rows:
            against = "–"
            if row.compared_with is not None:
                # to first order: the derivative of exp(loss_rise) times its error
                error = 100 * math.exp(row.loss_rise) * row.rise_stderr
                against = f"{row.compared_with}: {row.above:+.1f} % ± {error:.1f}"
            lines.append(f"| {row.name} | {100 * row.share:.0f} % | {row.perplexity:.2f} | {against} |")
        return lines

    def speed_table(self) -> list[str]:
        """Tokens per second, as Markdown."""
        if self.speed is None:
            return []
        s = self.speed
        kinds = ["prefill", "decode", "train"]
        lines = [
            "| speed, tokens/s, median (quartiles) | prefill | decode | training step |",
            "| --- | --- | --- | --- |",
        ]
        for name, speed in s.models.items():
            cells = [_rate(getattr(speed, kind)) for kind in kinds]
            lines.append(f"| {name} | {' | '.join(cells)} |")
        lines += [
            "",
            f"Batch {s.batch_size}, prompt {s.prompt_tokens} tokens, {s.decode_tokens} decoded, training step on the prompt "
            f"(forward and backward), {s.repeats} rounds, {s.dtype}, models in turns in one process.",
        ]
        return lines

    def save(self, directory: Path) -> None:
        """Write `report.json` and `report.md`, each whole or not at all."""
        write_text(directory / "report.json", json.dumps(asdict(self), indent=1, ensure_ascii=False))
        write_text(directory / "report.md", self.markdown() + "\n")


def check_report_files(directory: Path) -> None:
    """Check that files with a report's names are those of an earlier demo, which a new one replaces.

    Raises:
        ValueError: one of them is not.
    """
    interrupted = any(fullmatch(r"[0-9a-f]{12}", path.name) for path in directory.glob("training/*"))
    finished = _is_report(directory / "report.json")
    for name in FILES:
        file = directory / name
        ours = finished or (interrupted and name != "report.json")
        if name == "report.md" and file.is_file():
            ours = file.read_text(encoding="utf-8", errors="replace").startswith(_TITLE)
        if file.exists() and not ours:
            raise ValueError(
                f"output_dir {directory} holds a {name} that no demo wrote, and this one would replace it: choose another "
                "directory, or move the file"
            )


def _is_report(file: Path) -> bool:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(found, dict) and {"base_model", "layer_shares", "rows"} <= found.keys()


def _rate(rate: Rate | None) -> str:
    return "–" if rate is None else f"{rate.median:.0f} ({rate.low:.0f}–{rate.high:.0f})"
