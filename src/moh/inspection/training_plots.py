"""Head load over training, from what the trainer logged: the balance loss and each routed head's load at every entry.

Needs the extra `llm` (matplotlib). Reads `trainer_state.json`; not for other losses, see `plots.plot_losses`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moh._extras import require
from moh.inspection.plots import COLOURS
from moh.inspection.use import Row
from moh.training.checkpoints import last_complete_checkpoint, trainer_state

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LOAD_KEY = "routed_load"
"""In an entry of the log: layer by layer, the routed heads' loads."""


def find_history(model_dir: str | Path) -> list[dict[str, Any]] | None:
    """What the trainer logged of a model, or None: of the directory itself, a checkpoint, or the last one beside it.

    Args:
        model_dir: as training leaves it (`OUTPUT_DIR/model`), a checkpoint, or the output directory.
    """
    path = Path(model_dir).expanduser()
    for found in (path, last_complete_checkpoint(path), last_complete_checkpoint(path.absolute().parent)):
        try:
            if found is not None:
                history: list[dict[str, Any]] = trainer_state(found)["log_history"]
                return history
        except FileNotFoundError:
            continue
    return None


def training_rows(history: Sequence[Mapping[str, Any]]) -> list[Row]:
    """One row per logged entry that has routing, and routed layer: step, layer ("all" for what is of all layers),
    balance_loss, active_share, lowest and highest load of a routed head (of one layer, or the mean over them)."""
    rows: list[Row] = []
    for entry in history:
        if "balance_loss" not in entry:
            continue
        loads = [load for load in entry.get(LOAD_KEY, []) if load]
        spread: dict[str, Any] = {"lowest": "", "highest": ""}
        if loads:
            spread = {"lowest": sum(map(min, loads)) / len(loads), "highest": sum(map(max, loads)) / len(loads)}
        common = {name: entry.get(name, "") for name in ("balance_loss", "active_share")}
        rows.append({"step": int(entry["step"]), "layer": "all", **common, **spread})
        for layer, load in enumerate(entry.get(LOAD_KEY, [])):
            if load:
                rows.append({
                    "step": int(entry["step"]), "layer": layer, "balance_loss": "", "active_share": "",
                    "lowest": min(load), "highest": max(load),
                })  # fmt: skip
    return rows


def plot_training(rows: Sequence[Row]) -> Figure:
    """Over the steps: the balance loss, and the lowest and the highest load of a routed head, mean over the layers.

    Args:
        rows: of `training_rows`. Logs of older runs have no loads: then the balance loss is shown alone.

    Raises:
        ValueError: there are none.
    """
    if not rows:
        raise ValueError("the log has no entries with routing: was the model trained with MoH layers?")
    figure_module = require("matplotlib.figure", extra="llm")
    whole = [row for row in rows if row["layer"] == "all"]
    loads = [row for row in whole if row["lowest"] != ""]
    columns = 2 if loads else 1
    figure: Figure = figure_module.Figure(figsize=(5.0 * columns, 3.6), layout="constrained")
    panels = figure.subplots(1, columns, squeeze=False)[0]
    steps = [row["step"] for row in whole]
    panels[0].plot(steps, [row["balance_loss"] for row in whole], "-o", color=COLOURS[0], markersize=2.5)
    panels[0].set(xlabel="optimiser step", ylabel="load-balance loss", title="Balance loss, mean over layers")
    if loads:
        steps = [row["step"] for row in loads]
        for number, (name, mark) in enumerate((("highest", "-o"), ("lowest", "--s"))):
            values = [row[name] for row in loads]
            panels[1].plot(steps, values, mark, color=COLOURS[number], markersize=2.5, label=f"{name} of a layer")
        panels[1].set(xlabel="optimiser step", ylabel="load of a routed head", title="Loads, mean over layers")
        panels[1].set_ylim(0, 1.03)
        panels[1].legend(fontsize=8)
    for axes in panels:
        axes.grid(alpha=0.3)
    return figure
