"""Parameters of which not every combination runs by default, but every few values meet."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterable, Sequence
from typing import Any

import pytest


def covering(
    strength: int, /, *, kernel: Sequence[str] = (), indirect: Sequence[str] = (), **axes: Iterable[Any]
) -> pytest.MarkDecorator:
    """Parametrises a test with all combinations of the axes' values; those that add nothing to the default ones are slow.

    In the default ones every `strength` values of different axes occur together, so a fault that needs no more than these
    is found without the full product.

    Args:
        strength: how many values meet.
        kernel: axes that choose the compiled code: each of their combinations also meets each value of every other axis.
        indirect: axes that are fixtures.
        axes: name -> values, with ids of their own if they are `pytest.param`.
    """
    values = [[v if hasattr(v, "marks") else pytest.param(v, id=_id(v)) for v in axis] for axis in axes.values()]
    assert 0 < strength <= len(values) and {*kernel, *indirect} <= set(axes)
    places = [range(len(axis)) for axis in values]
    together = list(itertools.combinations(range(len(places)), strength))
    if kernel:
        chooses = [list(axes).index(name) for name in kernel]
        together += [(*chooses, other) for other in range(len(places)) if other not in chooses]
    chosen = _chosen(list(itertools.product(*places)), together)
    cases = []
    for case in itertools.product(*places):
        parts = [axis[place] for axis, place in zip(values, case, strict=True)]
        marks = [mark for part in parts for mark in part.marks]
        cases.append(
            pytest.param(
                *(part.values[0] for part in parts),
                id="-".join(str(part.id) for part in parts),
                marks=marks if case in chosen else [*marks, pytest.mark.slow],
            )
        )
    return pytest.mark.parametrize(list(axes), cases, indirect=list(indirect))


def _chosen(cases: list[tuple[int, ...]], together: list[tuple[int, ...]]) -> set[tuple[int, ...]]:
    """Cases in which all values meet that do so in any: greedily those with the most that are new, the same in every run."""
    random.Random(0).shuffle(cases)
    left = {case: {(axes, tuple(case[axis] for axis in axes)) for axes in together} for case in cases}
    found, met = set(), set()
    for enough in range(len(together), 0, -1):
        for case, new in list(left.items()):
            new -= met
            if len(new) >= enough:
                found.add(case)
                met |= new
            if len(new) >= enough or not new:
                del left[case]
    return found


def _id(value: Any) -> str:
    return str(value).removeprefix("torch.")
