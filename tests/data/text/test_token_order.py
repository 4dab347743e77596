"""A sequence's place is a function of its number: sources mix by their weights, every block is read once per epoch."""

from __future__ import annotations

from collections import Counter

import pytest

from moh.data.seeds import make_key
from moh.data.text.order import ROUND, Interleaving, permuted, shuffled_block


@pytest.mark.parametrize("size", [1, 2, 3, 5, 16, 17, 1000])
def test_every_index_is_met_once(size: int) -> None:
    orders = [[permuted(index, size, make_key(seed)) for index in range(size)] for seed in range(3)]
    assert all(sorted(order) == list(range(size)) for order in orders)
    assert size < 5 or len({tuple(order) for order in orders}) == 3


def test_no_place_of_a_permutation_is_preferred() -> None:
    size, seeds = 7, 7000
    counts = Counter((index, permuted(index, size, make_key(seed))) for seed in range(seeds) for index in range(size))
    assert len(counts) == size**2
    assert max(abs(count - seeds / size) for count in counts.values()) < 5 * (seeds / size) ** 0.5


def test_orders_are_the_same_on_every_machine() -> None:
    assert [permuted(index, 10, make_key(1, 2)) for index in range(10)] == [2, 3, 7, 1, 9, 6, 0, 4, 8, 5]


@pytest.mark.parametrize(
    "weights", [(1,), (1, 1), (5, 2, 1), (0.3, 0.3, 0.3), (1, 5000)], ids=["one", "equal", "three", "thirds", "tiny"]
)
def test_sources_have_their_share_at_every_moment(weights: tuple[float, ...]) -> None:
    order, seen = Interleaving(weights), Counter()
    for index in range(ROUND + 500):
        source, before = order[index]
        assert before == seen[source]  # each source continues where it stopped
        seen[source] += 1
        for number, weight in enumerate(weights):
            assert abs(seen[number] - weight / sum(weights) * (index + 1)) <= len(weights)
    assert order[3 * ROUND] == (order[0][0], 3 * order.quotas[order[0][0]])
    assert sum(order.quotas) == ROUND


def test_every_block_is_read_once_an_epoch_and_each_epoch_in_another_order() -> None:
    epochs = [[shuffled_block(epoch * 50 + i, 50, seed=1, source=0) for i in range(50)] for epoch in range(3)]
    assert all(sorted(epoch) == list(range(50)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert epochs[0] != [shuffled_block(i, 50, seed=2, source=0) for i in range(50)]
    assert epochs[0] != [shuffled_block(i, 50, seed=1, source=1) for i in range(50)]
