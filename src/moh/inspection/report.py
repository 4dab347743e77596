"""The results of an inspection as a directory: tables, figures with their data, and a summary.

`groups` and `ablation` run the model. Needs the extra `llm`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from moh._files import write_text
from moh.inspection.ablation import HeadAblation
from moh.inspection.group_plots import (
    plot_ablation,
    plot_distances,
    plot_group_load,
    plot_shared_and_routed,
    shared_and_routed_rows,
)
from moh.inspection.groups import HeadUse
from moh.inspection.plots import plot_head_load, plot_training, save_with_data
from moh.inspection.similarity import HeadSimilarity
from moh.inspection.statistics import (
    choosing_layers,
    distance_rows,
    layer_rows,
    pair_tests,
    permutation_test,
    score_variation,
    specialised_heads,
    unusual_heads,
)
from moh.inspection.tables import Row, save_rows

MAX_PAIR_GROUPS = 12
"""Above this many groups no two are compared: with that many tests none would stand out."""
_LEVEL = 0.05
_SHOWN = 12  # rows of a table in the summary


@dataclass(frozen=True)
class InspectionReport:
    """Made by `report`; `save` writes it.

    Attributes:
        name: the model's.
        use: the counts.
        untested: why nothing was tested; empty if it was.
        tests: rows of `permutation_test`.
        pairs: rows of `pair_tests`; empty for more than `MAX_PAIR_GROUPS` groups.
        specialised: rows of `specialised_heads`.
        unusual: rows of `unusual_heads`.
        scores: rows of `score_variation`; empty where it can't be tested.
        ablation: what each head is worth, if measured.
        similarity: of every two heads, if measured.
        training: rows of `training_rows`, if there is a log.
        notes: sentences on the inputs, for the summary.
    """

    name: str
    use: HeadUse
    untested: str
    tests: list[Row]
    pairs: list[Row]
    specialised: list[Row]
    unusual: list[Row]
    scores: list[Row] = field(default_factory=list)
    ablation: HeadAblation | None = None
    similarity: HeadSimilarity | None = None
    training: list[Row] = field(default_factory=list)
    notes: tuple[str, ...] = ()

    def save(self, directory: Path, *, groups: Sequence[str] | None = None) -> None:
        """Write all tables and figures, each whole or not at all.

        Args:
            directory: created if missing.
            groups: groups in the figure of loads per group; None chooses.

        Raises:
            ValueError: a group is unknown.
        """
        use = self.use
        per_group = plot_group_load(use, groups=groups)
        directory.mkdir(parents=True, exist_ok=True)
        use.save_csv(directory / "heads.csv")
        use.save_parquet(directory / "heads.parquet")
        save_rows(directory / "layers.csv", layer_rows(use))
        for name in ("tests", "pairs", "specialised", "unusual", "scores"):
            if rows := getattr(self, name):
                save_rows(directory / f"{name}.csv", rows)
        load = use.mean_load()
        of_head: list[Row] = [
            {"layer": place, "head": head, "kind": layer.kind(head), "load": float(load[place, head])}
            for place, layer in enumerate(use.layers)
            for head in range(layer.num_heads)
        ]
        title = "Head load" if len(use.groups) == 1 else "Head load, mean over groups"
        save_with_data(plot_head_load(load, use.configs, title=title), of_head, directory / "head_load")
        columns = ("group", "layer", "head", "kind", "load")
        save_with_data(per_group, [{c: row[c] for c in columns} for row in use.rows()], directory / "group_load")
        if any(layer.has_scores for layer in use.layers):
            scores = plot_group_load(use, quantity="gate", groups=groups)
            columns = ("group", "layer", "head", "kind", "gate")
            save_with_data(scores, [{c: row[c] for c in columns} for row in use.rows()], directory / "group_scores")
        kinds = shared_and_routed_rows(use)
        save_with_data(plot_shared_and_routed(kinds), kinds, directory / "shared_routed")
        if distances := distance_rows(use):
            save_with_data(plot_distances(use, self.tests), distances, directory / "distances")
        if self.ablation is not None:
            save_with_data(plot_ablation(self.ablation), self.ablation.rows(), directory / "ablation")
            save_rows(directory / "ablation_groups.csv", self.ablation.group_rows())
        if self.similarity is not None and self.similarity.rows():
            self.similarity.save_csv(directory / "similarity.csv")
        if self.training:
            save_with_data(plot_training(self.training), self.training, directory / "training")
        write_text(directory / "summary.md", self.markdown())

    def markdown(self) -> str:
        """The summary."""
        parts = [
            self._inputs(),
            self._differences(),
            self._heads(),
            self._scores(),
            self._ablation(),
            self._similarity(),
        ]
        return "\n".join([f"# Which head does what: {self.name}", "", *(line for part in parts for line in part)])

    def _inputs(self) -> Iterator[str]:
        use = self.use
        choosing = len(choosing_layers(use))
        share = sum(use.share()) / len(use.layers)
        dense = sum(layer.config is None for layer in use.layers)
        yield (
            f"{len(use.layers)} attention layers, {dense} of them dense; tokens choose among routed heads in {choosing} of "
            f"them. A token uses {100 * share:.0f} % of the heads."
        )
        yield ""
        groups = [
            (name, f"{int(inputs):,}", f"{int(tokens):,}")
            for name, inputs, tokens in zip(use.groups, use.inputs, use.tokens[:, 0], strict=True)
        ]
        yield from _table(("group", "inputs", "tokens"), groups[:50])
        if len(groups) > 50:
            yield f"{len(groups) - 50} more groups are in layers.csv."
            yield ""
        yield from (line for note in self.notes for line in (note, ""))

    def _differences(self) -> Iterator[str]:
        yield "## Do the groups differ?"
        yield ""
        if self.untested:
            yield f"Not tested: {self.untested}."
            yield ""
            return
        *layers, whole = self.tests
        clear = [row for row in layers if _of(row, "p_holm") <= _LEVEL]
        sizes = self.use.sample.groups.bincount(minlength=len(self.use.groups)).tolist()
        yield (
            f"Divergence between the groups' loads, mean over layers: {_of(whole, 'divergence'):.4f} bits; with labels "
            f"exchanged between inputs {_of(whole, 'by_chance'):.4f}; p = {_of(whole, 'p'):.3g}. {len(clear)} of "
            f"{len(layers)} layers have p ≤ {_LEVEL} after Holm's correction. Inputs tested per group: "
            f"{min(sizes)} to {max(sizes)}."
        )
        yield ""
        if self.pairs:
            alike = sorted(self.pairs, key=lambda row: _of(row, "divergence"))
            clear = [row for row in self.pairs if _of(row, "p_holm") <= _LEVEL]
            yield (
                f"{len(clear)} of {len(self.pairs)} comparisons of two groups have p ≤ {_LEVEL} after Holm's correction. "
                + (f"The {_SHOWN} most similar (all: pairs.csv):" if len(alike) > _SHOWN else "The most similar first:")
            )
            yield ""
            rows = [
                (row["group"], row["other"], f"{_of(row, 'divergence'):.4f}", f"{_of(row, 'by_chance'):.4f}",
                 f"{_of(row, 'p_holm'):.3g}")
                for row in alike[:_SHOWN]
            ]  # fmt: skip
            yield from _table(("group", "other", "divergence, bits", "by chance", "p (Holm)"), rows)

    def _heads(self) -> Iterator[str]:
        clear = [row for row in self.specialised if _of(row, "p") <= _LEVEL]
        if self.specialised:
            yield "## Heads that a group uses more, or less, than the others"
            yield ""
            yield (
                f"{len(clear)} of {len(self.specialised)} combinations of a routed head and a group have p ≤ {_LEVEL}, "
                "adjusted for all of them together (specialised.csv)."
            )
            yield ""
            rows = [
                (row["group"], row["layer"], row["head"], f"{_of(row, 'load'):.2f}", f"{_of(row, 'elsewhere'):.2f}",
                 f"{_of(row, 'z'):+.1f}", f"{_of(row, 'p'):.3g}")
                for row in clear[:_SHOWN]
            ]  # fmt: skip
            if rows:
                yield from _table(("group", "layer", "head", "load", "elsewhere", "z", "p"), rows)
        if choosing_layers(self.use):
            counts = [sum(row["what"] == what for row in self.unusual) for what in ("dead", "overloaded")]
            yield (
                f"Dead heads (used in no group): {counts[0]}; overloaded heads (nearly always used, in every group): "
                f"{counts[1]}."
            )
            yield ""

    def _scores(self) -> Iterator[str]:
        if not self.scores:
            return
        *layers, whole = self.scores
        more = sum(_of(row, "difference") > 0 for row in layers)
        yield "## Do the scores of shared heads vary more?"
        yield ""
        yield (
            f"Standard deviation of a head's mean gate over the groups, relative to its mean: {_of(whole, 'shared'):.3f} for "
            f"shared heads, {_of(whole, 'routed'):.3f} for routed ones, mean over layers; larger for shared heads in {more} of "
            f"{len(layers)} layers. Against any other choice of shared heads: p = {_of(whole, 'p'):.3g} (scores.csv)."
        )
        yield ""

    def _ablation(self) -> Iterator[str]:
        if self.ablation is None:
            return
        rows = self.ablation.rows()
        yield "## What a head is worth"
        yield ""
        yield f"Rise of the loss without the head, in nats, on {self.ablation.units} inputs (loss {self.ablation.loss:.4f})."
        yield ""
        kinds = []
        for kind in ("shared", "routed", "dense"):
            own = [row for row in rows if row["kind"] == kind]
            if own:
                rises = sorted(_of(row, "increase") for row in own)
                clear = sum(abs(_of(row, "increase")) > 2 * _of(row, "stderr") for row in own)
                kinds.append(
                    (kind, len(own), f"{math.fsum(rises) / len(own):.4f}", f"{rises[len(own) // 2]:.4f}", clear)
                )
        yield from _table(("heads", "number", "mean rise", "median", "beyond two standard errors"), kinds)
        dearest = sorted(rows, key=lambda row: -_of(row, "increase"))[:_SHOWN]
        columns = [
            (row["layer"], row["head"], row["kind"], f"{_of(row, 'increase'):.4f} ± {_of(row, 'stderr'):.4f}")
            for row in dearest
        ]
        yield from _table(("layer", "head", "kind", "rise ± standard error"), columns)

    def _similarity(self) -> Iterator[str]:
        means = [] if self.similarity is None else self.similarity.means()
        if not means:
            return
        yield "## How alike heads are"
        yield ""
        yield "Mean over the pairs of heads that a token uses: 1 means the same (each pair: similarity.csv)."
        yield ""
        rows = [(row["layer"], f"{_of(row, 'patterns'):.3f}", f"{_of(row, 'outputs'):.3f}") for row in means]
        yield from _table(("layer", "attention patterns", "outputs, cosine"), rows)


def report(
    name: str,
    use: HeadUse,
    *,
    permutations: int = 999,
    seed: int = 0,
    dead: float = 0.01,
    overloaded: float = 0.95,
    ablation: HeadAblation | None = None,
    similarity: HeadSimilarity | None = None,
    training: Sequence[Row] = (),
    notes: Sequence[str] = (),
) -> InspectionReport:
    """Test the counts, and put everything together.

    Args:
        name: the model's.
        use: the counts.
        permutations: permutations per test.
        seed: seed of the tests.
        dead: threshold of `unusual_heads`.
        overloaded: threshold of `unusual_heads`.
        ablation: from `ablate_heads`.
        similarity: from `head_similarity`.
        training: from `training_rows`.
        notes: sentences on the inputs, for the summary.

    Raises:
        ValueError: a number is out of range. Groups that can't be tested are not an error: `untested` gives the reason.
    """
    unusual = unusual_heads(use, dead=dead, overloaded=overloaded)
    if permutations < 1:
        raise ValueError(f"permutations must be at least 1, got {permutations}")
    untested, tests, pairs, specialised, scores = "", [], [], [], []
    with suppress(ValueError):  # layers without scores, or one group: there is nothing to compare
        scores = score_variation(use, permutations=permutations, seed=seed)
    try:
        tests = permutation_test(use, permutations=permutations, seed=seed)
    except ValueError as error:
        untested = str(error)
    else:
        specialised = specialised_heads(use, permutations=permutations, seed=seed)
        sizes = use.sample.groups.bincount(minlength=len(use.groups))
        # two groups of one input each can't be compared
        if 2 < int((sizes > 0).sum()) <= MAX_PAIR_GROUPS and int(sizes[sizes > 0].min()) > 1:
            pairs = pair_tests(use, permutations=permutations, seed=seed)
    return InspectionReport(
        name,
        use,
        untested,
        tests,
        pairs,
        specialised,
        unusual,
        scores,
        ablation,
        similarity,
        list(training),
        tuple(notes),
    )


def _of(row: Row, column: str) -> float:
    return float(row[column])


def _table(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> Iterator[str]:
    yield f"| {' | '.join(columns)} |"
    yield f"| {' | '.join('---' for _ in columns)} |"
    for row in rows:
        yield f"| {' | '.join(str(cell).replace('|', chr(92) + '|') for cell in row)} |"
    yield ""
