"""Intervals and tests against published or hand-computed values."""

import numpy as np
import pytest

from memreason.measure.stats import cluster_bootstrap, mcnemar_exact, paired_bootstrap, wilson


@pytest.mark.parametrize(
    ("correct", "n", "low", "high"),
    [
        (81, 263, 0.2553, 0.3662),  # Newcombe 1998, Statistics in Medicine 17:857, table I, method 3
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson(correct: int, n: int, low: float, high: float) -> None:
    assert wilson(correct, n) == pytest.approx((low, high), abs=5e-5)


def test_wilson_at_the_ends() -> None:
    assert wilson(0, 0) == (0.0, 1.0)
    assert wilson(0, 5)[0] == 0.0
    assert wilson(5, 5)[1] == 1.0
    low, high = wilson(3, 10)
    assert wilson(7, 10) == pytest.approx((1 - high, 1 - low))
    narrow = wilson(3, 10, confidence=0.5)
    assert low < narrow[0] < 0.3 < narrow[1] < high
    with pytest.raises(ValueError, match="6 of 5"):
        wilson(6, 5)


def pairs(both: int, only_a: int, only_b: int, neither: int) -> tuple[list[bool], list[bool]]:
    a = [True] * (both + only_a) + [False] * (only_b + neither)
    b = [True] * both + [False] * only_a + [True] * only_b + [False] * neither
    return a, b


@pytest.mark.parametrize(
    ("only_a", "only_b", "p"),
    [
        (0, 0, 1.0),
        (0, 5, 2 / 32),  # 2 * 0.5 ** 5
        (1, 9, 2 * 11 / 1024),  # 2 * (1 + 10) / 2 ** 10
        (3, 3, 1.0),
        (4, 12, 2 * (1 + 16 + 120 + 560 + 1820) / 65536),
    ],
)
def test_mcnemar(only_a: int, only_b: int, p: float) -> None:
    a, b = pairs(20, only_a, only_b, 7)
    assert mcnemar_exact(a, b) == pytest.approx(p)
    assert mcnemar_exact(b, a) == pytest.approx(p)


def test_mcnemar_of_many_pairs_does_not_overflow() -> None:
    assert 0 < mcnemar_exact(*pairs(0, 900, 1100, 0)) < 1e-4


def test_bootstrap_agrees_with_the_normal_interval() -> None:
    a, b = pairs(300, 120, 80, 100)
    difference, low, high = paired_bootstrap(a, b)
    error = np.std(np.array(a, float) - np.array(b, float)) / np.sqrt(len(a))
    assert difference == pytest.approx(40 / 600)
    assert (low, high) == pytest.approx((difference - 1.96 * error, difference + 1.96 * error), abs=0.004)
    assert paired_bootstrap(a, b) == (difference, low, high)
    assert paired_bootstrap(a, b, seed=1) != (difference, low, high)
    assert paired_bootstrap(b, a)[0] == -difference


def test_groups_are_drawn_together() -> None:
    values = [0.0] * 50 + [1.0] * 50
    alone = cluster_bootstrap(values)
    copies = cluster_bootstrap(values, [i // 10 for i in range(100)])  # ten groups of ten equal values
    assert alone[0] == copies[0] == 0.5
    assert copies[2] - copies[1] > 2.5 * (alone[2] - alone[1])  # the square root of 10, about 3.16
    assert cluster_bootstrap(values, ["one"] * 100) == (0.5, 0.5, 0.5)


def test_groups_of_unequal_size_weigh_by_their_size() -> None:
    mean, low, high = cluster_bootstrap([1, 1, 1, 0], ["x", "x", "x", "y"], samples=2000)
    assert (mean, low, high) == (0.75, 0.0, 1.0)


def test_draws_do_not_depend_on_labels_or_their_type() -> None:
    values = [0.0, 1.0, 1.0, 0.0, 1.0]
    assert cluster_bootstrap(values, [3, 3, 1, 1, 2]) == cluster_bootstrap(values, np.array(["b", "b", "z", "z", "a"]))


def test_refusals() -> None:
    with pytest.raises(ValueError, match="2 and 1"):
        mcnemar_exact([True, False], [True])
    with pytest.raises(ValueError, match="2 and 1"):
        paired_bootstrap([True, False], [True])
    with pytest.raises(ValueError, match="2 and 1"):
        cluster_bootstrap([1, 0], ["x"])
    with pytest.raises(ValueError, match="at least one"):
        cluster_bootstrap([])
