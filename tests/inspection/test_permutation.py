"""Promises of the statistics: known values; tests find real differences, and nothing where labels mean nothing."""

from __future__ import annotations

import dataclasses
import math
import statistics

import pytest
import torch
from group_cases import made_up, random_use

from moh import MoHConfig
from moh.inspection import (
    distance_rows,
    layer_rows,
    load_distance,
    load_entropy,
    pair_tests,
    permutation_test,
    score_variation,
    specialised_heads,
    unusual_heads,
)
from moh.inspection.statistics import holm


def noisy(mean: list[float], count: int, seed: int, spread: float = 0.02) -> list[list[float]]:
    """Inputs whose loads scatter around a mean."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.tensor(mean) + spread * torch.randn(count, len(mean), generator=generator)).clamp(0, 1).tolist()


@pytest.mark.parametrize(
    ("load", "bits"), [([0.5, 0.5, 0.5, 0.5], 2.0), ([1.0, 0.0], 0.0), ([0.75, 0.25], 2 - 0.75 * math.log2(3))], ids=str
)
def test_entropy_is_that_of_the_load_as_a_distribution(load, bits) -> None:
    assert float(load_entropy(torch.tensor(load))) == pytest.approx(bits)


def test_the_distance_is_scipys() -> None:
    distance = pytest.importorskip("scipy.spatial.distance")
    p, q = torch.rand(2, 5, 8, dtype=torch.float64)
    p[0, :3] = 0
    expected = distance.jensenshannon(p.numpy(), q.numpy(), base=2, axis=1)
    assert load_distance(p, q).tolist() == pytest.approx(expected.tolist())
    assert load_distance(q, p).tolist() == pytest.approx(expected.tolist())
    assert float(load_distance(p[0], p[0])) == 0
    assert float(load_distance(torch.tensor([1.0, 0, 0]), torch.tensor([0, 0.3, 0.3]))) == pytest.approx(1)


def test_a_load_of_none_of_the_heads_is_like_itself_and_unlike_any_other() -> None:
    none, some = torch.zeros(3), torch.tensor([0.5, 0.0, 0.1])
    assert float(load_entropy(none)) == 0
    assert (float(load_distance(none, none)), float(load_distance(none, some))) == (0, pytest.approx(1))
    assert load_entropy(torch.tensor([math.nan, math.nan])).isnan()  # a group without inputs


NONE, FEW = [[0.0, 0.0, 0.0]] * 6, [[0.2, 0.0, 0.0]] * 6


@pytest.mark.parametrize(
    ("inputs", "divergence"),
    [({"a": NONE, "b": NONE}, 0.0), ({"a": NONE, "b": FEW}, 0.0), ({"a": NONE, "b": FEW, "c": [[0, 0.2, 0]] * 6}, 1.0)],
    ids=["no_group", "one_group", "two_groups"],
)
def test_groups_that_use_no_routed_head_differ_by_nothing(inputs, divergence) -> None:
    # as with a router that has a threshold: the divergence is one of how the uses that there are spread
    use = made_up(inputs)
    for row in permutation_test(use, permutations=99):
        assert row["divergence"] == pytest.approx(divergence) and 0 <= row["by_chance"] <= 1
        assert row["p"] == (1 if divergence == 0 else pytest.approx(0.01))
    assert all(row["p"] > 0.05 for row in pair_tests(use, permutations=99) if "a" in (row["group"], row["other"]))
    assert all(not math.isnan(row[name]) for row in layer_rows(use) for name in ("entropy", "evenness"))
    assert all(0 <= row["distance"] <= 1 for row in distance_rows(use))


def test_layers_are_described_by_their_routed_heads() -> None:
    use = made_up({"a": [[0.5, 0.5, 0.0, 0.0]], "b": [[0.25] * 4]})
    a, b = layer_rows(use)
    assert (a["entropy"], a["evenness"], a["share"], a["routed_heads"]) == (1.0, 0.5, pytest.approx(2 / 5), 4)
    assert (b["entropy"], b["evenness"], b["shared_contribution"]) == (2.0, 1.0, pytest.approx(0.5))
    (row,) = distance_rows(use)
    assert (row["layer"], row["group"], row["other"]) == (0, "a", "b")
    assert row["distance"] == pytest.approx(float(load_distance(use.load[0][0, 1:], use.load[0][1, 1:])))
    dense = layer_rows(random_use(1, [None]))[0]
    assert dense["routed_heads"] == 0 and math.isnan(dense["entropy"]) and math.isnan(dense["shared_contribution"])
    assert distance_rows(random_use(3, [None, MoHConfig(4, 4, 0)])) == []


def test_groups_that_differ_are_told_apart_and_alike_ones_are_not() -> None:
    alike = {"a": noisy([0.5, 0.3, 0.2], 12, 0), "b": noisy([0.5, 0.3, 0.2], 12, 1)}
    apart = {"a": noisy([0.5, 0.3, 0.2], 12, 0), "b": noisy([0.3, 0.3, 0.4], 12, 1)}
    for inputs, differ in ((alike, False), (apart, True)):
        layer, whole = permutation_test(made_up(inputs), permutations=199)
        assert (whole["layer"], layer["layer"]) == ("all", 0)
        assert whole["p"] == layer["p"] == layer["p_holm"]  # a single layer
        assert (whole["p"] == 1 / 200) if differ else (whole["p"] > 0.1)
        assert (whole["divergence"] > 5 * whole["by_chance"]) == differ


def test_p_values_are_uniform_where_labels_mean_nothing() -> None:
    p = []
    for seed in range(60):
        inputs = {"a": noisy([0.4, 0.3, 0.3], 5, 2 * seed), "b": noisy([0.4, 0.3, 0.3], 5, 2 * seed + 1)}
        p.append(permutation_test(made_up(inputs), permutations=49)[-1]["p"])
    assert 0.35 < sum(p) / len(p) < 0.65
    assert sum(value <= 0.2 for value in p) <= 21  # 12 expected; 22 or more have a chance below 1 %


def test_the_divergence_of_two_groups_of_one_size_is_the_squared_distance() -> None:
    use = made_up({"a": [[0.6, 0.3, 0.1]] * 2, "b": [[0.2, 0.3, 0.5]] * 2})
    row = permutation_test(use, permutations=1)[0]
    assert row["divergence"] == pytest.approx(distance_rows(use)[0]["distance"] ** 2)


def test_whole_inputs_change_places_not_tokens() -> None:
    """Two inputs per group can be arranged in 6 ways, of which 2 keep the groups together: p can't be below 1/3."""
    use = made_up({"a": [[0.9, 0.1]] * 2, "b": [[0.1, 0.9]] * 2}, tokens=10_000)
    assert permutation_test(use, permutations=999)[-1]["p"] == pytest.approx(1 / 3, abs=0.05)


def test_one_seed_gives_one_result() -> None:
    use = made_up({"a": noisy([0.5, 0.5], 6, 0), "b": noisy([0.5, 0.5], 6, 1)})
    assert permutation_test(use, permutations=99, seed=3) == permutation_test(use, permutations=99, seed=3)
    assert permutation_test(use, permutations=99, seed=3) != permutation_test(use, permutations=99, seed=4)


def test_holm_is_the_textbooks() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.9]) == [1.0, 1.0] and holm([]) == []


def test_pairs_are_tested_one_by_one_and_adjusted_together() -> None:
    same = [0.5, 0.3, 0.2]
    use = made_up({"a": noisy(same, 9, 0), "b": noisy(same, 9, 1), "c": noisy([0.2, 0.3, 0.5], 9, 2)})
    rows = pair_tests(use, permutations=199)
    assert [(row["group"], row["other"]) for row in rows] == [("a", "b"), ("a", "c"), ("b", "c")]
    assert [row["p_holm"] for row in rows] == holm([row["p"] for row in rows])
    assert [row["p_holm"] <= 0.05 for row in rows] == [False, True, True]


def test_the_head_that_a_group_uses_more_is_found() -> None:
    use = made_up(
        {"a": noisy([0.3, 0.4, 0.3], 9, 0), "b": noisy([0.3, 0.4, 0.3], 9, 1), "c": noisy([0.45, 0.4, 0.15], 9, 2)}
    )
    rows = specialised_heads(use, permutations=199)
    assert len(rows) == 3 * 3
    first, second = rows[:2]
    assert {(row["group"], row["head"], row["z"] > 0) for row in (first, second)} == {("c", 1, True), ("c", 3, False)}
    for row in rows:
        place = use.groups.index(row["group"])
        assert row["load"] == pytest.approx(float(use.load[0][place, row["head"]]), abs=1e-6)
        others = [g for g in range(3) if g != place]
        assert row["elsewhere"] == pytest.approx(float(use.load[0][others, row["head"]].mean()), abs=1e-6)
        assert row["difference"] == pytest.approx(row["load"] - row["elsewhere"], abs=1e-6)
        if row["head"] == 2:
            assert row["p"] > 0.05  # both groups use it equally


def test_dead_and_overloaded_heads_are_those_of_all_groups() -> None:
    use = made_up({"a": [[0.99, 0.005, 0.0, 0.9]], "b": [[0.97, 0.3, 0.0, 0.99]]}, active=2)
    assert [(row["head"], row["what"]) for row in unusual_heads(use)] == [(1, "overloaded"), (3, "dead")]
    assert [row["head"] for row in unusual_heads(use, dead=0.0, overloaded=0.8)] == [1, 4]
    with pytest.raises(ValueError, match=r"0 <= dead < overloaded <= 1 must hold, got dead = 0.5 and overloaded = 0.2"):
        unusual_heads(use, dead=0.5, overloaded=0.2)


@pytest.mark.parametrize(
    ("use", "permutations", "message"),
    [
        (made_up({"a": [[0.5, 0.5]] * 3}), 9, "at least 2 groups with inputs are needed, got 1"),
        (made_up({"a": [[0.5, 0.5]], "b": [[0.4, 0.6]]}), 9, "each group has a single input"),
        (random_use(2, [None, MoHConfig(4, 4, 0)]), 9, "in no layer do tokens choose among routed heads"),
        (made_up({"a": [[0.5, 0.5]] * 3, "b": [[0.5, 0.5]]}), 0, "permutations must be at least 1, got 0"),
    ],
    ids=["one_group", "one_input_each", "nothing_routed", "no_permutations"],
)
@pytest.mark.parametrize("test", [permutation_test, specialised_heads], ids=["layers", "heads"])
def test_what_cannot_be_tested_is_told(test, use, permutations, message) -> None:
    with pytest.raises(ValueError, match=message):
        test(use, permutations=permutations)


def test_one_group_with_a_single_input_among_larger_ones_is_tested() -> None:
    use = made_up({"a": noisy([0.5, 0.5], 9, 0), "b": [[0.1, 0.9]]})
    assert permutation_test(use, permutations=199)[-1]["p"] == pytest.approx(0.1, abs=0.06)  # one input in ten


def scored(gates: list[list[list[float]]], layers: list[MoHConfig | None]):
    """Head use with these gates `[G, H]` of each layer."""
    use = random_use(len(gates[0]), layers)
    return dataclasses.replace(use, gate=[torch.tensor(layer, dtype=torch.float64) for layer in gates])


def test_scores_that_vary_in_shared_heads_alone_are_found_and_others_are_not() -> None:
    config = MoHConfig(8, 3, 2)
    steady, moved = [1.0] * 3 + [0.4] * 5, [2.0, 0.5, 3.0] + [0.4] * 5
    *layers, whole = score_variation(scored([[steady, moved]] * 3, [config] * 3))
    assert [row["layer"] for row in layers] == [0, 1, 2] and whole["layer"] == "all"
    expected = [statistics.stdev(pair) / statistics.mean(pair) for pair in ((1, 2), (1, 0.5), (1, 3))]
    assert whole["shared"] == pytest.approx(statistics.mean(expected)) and whole["routed"] == 0
    assert whole["p"] < 0.01 and layers[0]["p"] == pytest.approx(1 / 56, abs=0.02)  # 8 choose 3 sets of shared heads
    moved = [1.0] * 3 + [0.8, 0.1, 0.7, 0.2, 0.9]
    (_, whole) = score_variation(scored([[steady, moved]], [config]))
    assert whole["p"] == 1 and whole["difference"] < 0


def test_random_scores_give_uniform_p() -> None:
    config, generator = MoHConfig(10, 4, 3), torch.Generator().manual_seed(0)
    found = []
    for _ in range(60):
        gates = torch.rand(2, 5, 10, generator=generator).tolist()
        found.append(score_variation(scored(gates, [config] * 2), permutations=39)[-1]["p"])
    assert 0.35 < statistics.mean(found) < 0.65 and sum(p <= 0.1 for p in found) <= 14


@pytest.mark.parametrize(
    "config", [None, MoHConfig(4, 1, 1, "linear"), MoHConfig(4, 0, 2), MoHConfig(4, 4, 0)], ids=str
)
def test_layers_without_scores_of_both_kinds_are_not_tested(config) -> None:
    with pytest.raises(ValueError, match="no layer has routing scores of shared and of routed heads"):
        score_variation(random_use(3, [config]))


@pytest.mark.parametrize(
    ("groups", "permutations", "message"),
    [(1, 9, "at least 2 groups with inputs are needed, got 1"), (2, 0, "permutations must be at least 1, got 0")],
)
def test_scores_of_one_group_have_no_variation(groups, permutations, message) -> None:
    with pytest.raises(ValueError, match=message):
        score_variation(random_use(groups, [MoHConfig(4, 1, 1)]), permutations=permutations)
