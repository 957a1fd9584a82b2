"""Sums, truncations and distances of low-rank products, against dense matrices and numbers worked out by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from texforce_cli.core.lora_algebra import (
    balance,
    concatenate,
    distance,
    sketch,
    sketched_norm,
    squared_norm,
    term_scale,
    truncate,
    truncated_svd,
)

sizes = st.integers(1, 6)
weights = st.floats(-3, 3).filter(lambda weight: weight == 0 or abs(weight) > 1e-6)


def pair(seed: int, rank: int, inputs: int, outputs: int) -> tuple[Any, Any]:
    rng = np.random.default_rng(seed)
    return rng.standard_normal((rank, inputs)).astype(np.float32), rng.standard_normal((outputs, rank)).astype(
        np.float32
    )


def dense(factors: tuple[Any, Any]) -> Any:
    return factors[1].astype(float) @ factors[0].astype(float)


def test_a_sum_by_hand() -> None:
    one = (np.array([[1.0, 0.0]]), np.array([[2.0], [0.0]]))  # [[2, 0], [0, 0]]
    two = (np.array([[0.0, 1.0]]), np.array([[0.0], [3.0]]))  # [[0, 0], [0, 3]]
    assert dense(concatenate([(one, 0.5), (two, -1.0)])).tolist() == [[1.0, 0.0], [0.0, -3.0]]


def test_a_truncation_by_hand() -> None:
    diagonal = (np.eye(3), np.diag([3.0, 2.0, 1.0]))
    cut, spectrum = truncate(diagonal, rank=1)
    assert np.allclose(dense(cut), np.diag([3.0, 0.0, 0.0]))
    assert (spectrum.total, spectrum.dropped) == pytest.approx((14.0, 5.0))
    for error, rank in ((0.0, 3), (0.26, 3), (0.27, 2), (0.59, 2), (0.6, 1), (1.0, 1)):  # sqrt(1/14), sqrt(5/14)
        assert len(truncate(diagonal, max_error=error)[0][0]) == rank
    assert len(truncate((np.zeros((2, 3)), np.zeros((4, 2))))[0][0]) == 1


@given(st.lists(st.tuples(st.integers(1, 5), weights), min_size=1, max_size=4), sizes, sizes, st.randoms())
def test_the_sum_is_exact_and_commutes(terms: list[tuple[int, float]], inputs: int, outputs: int, random: Any) -> None:
    made = [(pair(i, rank, inputs, outputs), weight) for i, (rank, weight) in enumerate(terms)]
    expected = sum(weight * dense(factors) for factors, weight in made)
    scale = sum(abs(weight) * np.linalg.norm(dense(factors)) for factors, weight in made)
    assert np.linalg.norm(dense(concatenate(made)) - expected) <= 1e-6 * scale
    random.shuffle(made)
    assert np.linalg.norm(dense(concatenate(made)) - expected) <= 1e-6 * scale


@given(st.integers(1, 8), st.integers(1, 8), st.integers(1, 8), st.integers(1, 8))
def test_a_truncation_is_as_good_as_that_of_the_dense_matrix(rank: int, inputs: int, outputs: int, keep: int) -> None:
    factors = pair(1, rank, inputs, outputs)
    matrix = dense(factors)
    cut, spectrum = truncate(factors, rank=keep)
    optimum = np.linalg.svd(matrix, compute_uv=False)[keep:]
    assert np.linalg.norm(dense(cut) - matrix) == pytest.approx(np.linalg.norm(optimum), rel=1e-6, abs=1e-6)
    assert spectrum.dropped == pytest.approx(np.sum(optimum**2), rel=1e-6, abs=1e-9)
    assert spectrum.total == pytest.approx(np.sum(matrix**2), rel=1e-6)
    own, told = truncated_svd(matrix, keep)
    assert np.linalg.norm(dense(own) - matrix) == pytest.approx(np.linalg.norm(optimum), rel=1e-6, abs=1e-6)
    assert told.dropped == pytest.approx(np.sum(optimum**2), rel=1e-6, abs=1e-9)


@given(st.integers(1, 5), sizes, sizes, st.floats(1e-6, 1e6))
def test_balancing_keeps_the_product_to_the_bit(rank: int, inputs: int, outputs: int, skew: float) -> None:
    a, b = pair(2, rank, inputs, outputs)
    a = (a * skew).astype(np.float32)
    even_a, even_b = balance((a, b))
    assert np.array_equal(
        even_a[:, :, None].astype(float) * even_b.T[:, None].astype(float), a[:, :, None].astype(float) * b.T[:, None]
    )
    ratio = np.linalg.norm(even_a, axis=1) / np.linalg.norm(even_b, axis=0)
    assert np.all((ratio > 0.49) & (ratio < 2.1))


def test_balancing_leaves_zeros_alone() -> None:
    a, b = balance((np.zeros((1, 2), np.float32), np.ones((3, 1), np.float32)))
    assert (a.tolist(), b.tolist()) == ([[0, 0]], [[1], [1], [1]])


def test_balancing_measures_in_float64() -> None:
    a, b = balance((np.full((1, 2), 1e20, np.float32), np.full((3, 1), 1e-20, np.float32)))
    assert (a.max(), b.max()) == (pytest.approx(1, rel=1), pytest.approx(1, rel=1))


def test_norms_and_distances() -> None:
    one, two = pair(3, 4, 30, 20), pair(4, 2, 30, 20)
    assert squared_norm(one) == pytest.approx(np.sum(dense(one) ** 2), rel=1e-9)
    exact = np.sum((dense(one) - 0.5 * dense(two)) ** 2)
    assert distance(one, [(two, 0.5)]) == pytest.approx(exact, rel=1e-9)
    assert distance(one, [(one, 1.0)]) <= 1e-14 * exact
    nearly = (one[0], one[1] * (1 + 1e-9))
    assert distance(nearly, [(one, 1.0)]) == pytest.approx(1e-18 * squared_norm(one), rel=1e-5)
    rows = (np.array([[3.0, 4.0], [1.0, 0.0]]), np.array([[2.0, 0.0], [0.0, 7.0]]))
    assert term_scale(rows) == 25 * 4 + 1 * 49


def test_a_sketch_estimates_a_distance_and_is_linear() -> None:
    ratios = []
    for seed in range(800):
        one, two = pair(2 * seed, 4, 30, 20), pair(2 * seed + 1, 2, 30, 20)
        estimate = sketched_norm(sketch([(one, 1.0), (two, -0.5)]))
        ratios.append(estimate / np.sum((dense(one) - 0.5 * dense(two)) ** 2))
    assert np.mean(ratios) == pytest.approx(1, rel=0.05)
    assert np.std(ratios) < 0.75
    assert np.allclose(sketch([(one, 1.0), (two, -3.0)]), sketch([(one, 1.0)]) - 3 * sketch([(two, 1.0)]))
    assert sketched_norm(np.eye(8)) == 8 / 64


@given(st.integers(0, 199), st.integers(0, 3), st.booleans())
def test_one_wrong_number_is_seen(place: int, row: int, in_a: bool) -> None:
    one = pair(5, 4, 300, 200)
    a, b = one[0].copy(), one[1].copy()
    if in_a:
        a[row, place] += 1e-3
        exact = (1e-3 * np.linalg.norm(b[:, row])) ** 2
    else:
        b[place, row] += 1e-3
        exact = (1e-3 * np.linalg.norm(a[row])) ** 2
    off = sketched_norm(sketch([((a, b), 1.0)]) - sketch([(one, 1.0)]))
    assert 0.1 * exact < off < 10 * exact
