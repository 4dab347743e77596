"""Pictures of all heads of a model and of their loads over training, and loss curves (extra `plot`, matplotlib).

Each function returns a figure; `save` writes it. Colours are distinct in print and to colour-blind readers. No display
is needed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from moh._extras import require
from moh._files import replacing_file
from moh.config import MoHConfig
from moh.inspection.tables import Row, save_rows
from moh.training.checkpoints import last_complete_checkpoint, trainer_state

if TYPE_CHECKING:
    from matplotlib.figure import Figure


COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#000000")
"""Okabe and Ito's palette."""
DASHES = ("-", "--", "-.", ":")


def new_figure(width: float, height: float) -> Figure:
    """An empty figure; sizes in inches."""
    figure: Figure = require("matplotlib.figure", extra="plot").Figure(figsize=(width, height), layout="constrained")
    return figure


def plot_head_load(load: Tensor, layers: Sequence[MoHConfig | None], *, title: str = "Head load") -> Figure:
    """Layers x heads, the share of tokens that activate each head; shared heads are marked S, those of dense layers D.

    Args:
        load: `[L, H]`, NaN where there is no head; for example `HeadUse.mean_load()`.
        layers: heads and routing of each layer; None for a dense one.
        title: of the figure.
    """
    count, heads = load.shape
    height = max(4.4, 1.4 + 0.2 * count)  # at least the length of the colour bar's label
    figure = new_figure(1.6 + 0.42 * heads, height)
    axes = figure.subplots()
    image = axes.imshow(load.numpy(), cmap="cividis", vmin=0, vmax=1, aspect="auto", interpolation="nearest")
    for layer, config in enumerate(layers):
        marked = range(int((~load[layer].isnan()).sum())) if config is None else config.shared_indices
        for head in marked:
            mark = "D" if config is None else "S"
            axes.text(head, layer, mark, ha="center", va="center", fontsize=7, color="#333333")
    axes.set(
        xlabel="head", ylabel="layer", title=title, xticks=range(heads), yticks=range(0, count, max(1, count // 15))
    )
    bar = figure.colorbar(image, ax=axes)
    dense = "; D: dense layer" if None in layers else ""
    bar.set_label(f"share of tokens that use the head (S: shared, always 1{dense})")
    return figure


def plot_losses(curves: Mapping[str, Sequence[tuple[int, float]]], *, title: str = "Training loss") -> Figure:
    """One line per name, each a list of (step, loss)."""
    figure = new_figure(6.4, 4)
    axes = figure.subplots()
    for index, (name, points) in enumerate(curves.items()):
        steps, losses = zip(*points, strict=True) if points else ((), ())
        axes.plot(steps, losses, DASHES[index % 4], color=COLOURS[index % 4], label=name, marker="o", markersize=2.5)
    axes.set(xlabel="optimiser step", ylabel="next-token loss (nats)", title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


def save(figure: Figure, path: str | Path) -> None:
    """Write the figure in the format of the path's suffix (.png, .svg), whole or not at all."""
    with replacing_file(Path(path)) as file:
        figure.savefig(file, dpi=150)


def save_with_data(figure: Figure, rows: Sequence[Mapping[str, object]], stem: str | Path) -> None:
    """Write a figure as STEM.png and STEM.svg and its data as STEM.csv, each whole or not at all."""
    stem = Path(stem)
    save_rows(stem.with_name(f"{stem.name}.csv"), rows)
    for suffix in ("png", "svg"):
        save(figure, stem.with_name(f"{stem.name}.{suffix}"))


LOAD_KEY = "routed_load"
"""Key of the routed heads' loads, layer by layer, in an entry of the log."""


def find_history(model_dir: str | Path) -> list[dict[str, Any]] | None:
    """The trainer's log of a model, from the directory itself or the last checkpoint next to it; None if there is none.

    Args:
        model_dir: the trained model (`OUTPUT_DIR/model`), a checkpoint, or the output directory.
    """
    path = Path(model_dir).expanduser()
    if path.is_file():  # .gguf: what is next to it is not its training
        return None
    for found in (path, last_complete_checkpoint(path), last_complete_checkpoint(path.absolute().parent)):
        try:
            if found is not None:
                history: list[dict[str, Any]] = trainer_state(found)["log_history"]
                return history
        except FileNotFoundError:
            continue
    return None


def training_rows(history: Sequence[Mapping[str, Any]]) -> list[Row]:
    """One row per logged entry with routing and per routed layer: step, layer ("all": over all layers), balance_loss,
    active_share, lowest and highest load of a routed head (of the layer, or the mean over layers)."""
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
        rows: from `training_rows`. Logs of older runs have no loads: then only the balance loss is shown.

    Raises:
        ValueError: there are no rows.
    """
    if not rows:
        raise ValueError("the log has no entries with routing: was the model trained with MoH layers?")
    whole = [row for row in rows if row["layer"] == "all"]
    loads = [row for row in whole if row["lowest"] != ""]
    columns = 2 if loads else 1
    figure = new_figure(5.0 * columns, 3.6)
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
