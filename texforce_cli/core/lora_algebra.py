"""The algebra of LoRAs: sums, truncations and distances of products B A, without ever forming one.

The combination of sec. 3.7 of the paper, sum of alpha_i theta_i, is a sum of the changes B_i A_i of the weights: sums of the
factors themselves would depend on how each product happens to be split. Shapes: A (rank, inputs), B (outputs, rank).
"""

from __future__ import annotations

import functools
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Pair = tuple[Array, Array]
"""A factor A (rank, inputs) and a factor B (outputs, rank)."""

PROBES = 8
_ROUNDING = 1e-14
"""What float64 leaves of terms that cancel, relative to `term_scale`'s root."""
_RESOLVED = 1e-10
"""Squared norms above this share of `term_scale` are right to 1e-5 as a trace."""


@dataclass(frozen=True)
class Spectrum:
    """Squared Frobenius norms: of the whole change, and of what a truncation left out."""

    total: float
    dropped: float


def double(pair: Pair) -> Pair:
    """The factors in float64; those that are so already are not copied."""
    return pair[0].astype(np.float64, copy=False), pair[1].astype(np.float64, copy=False)


def concatenate(terms: Sequence[tuple[Pair, float]]) -> Pair:
    """The sum of c_i B_i A_i as one pair, exact: A = [A_1; A_2; ...], B = [c_1 B_1, c_2 B_2, ...]."""
    a = np.concatenate([a for (a, _), _ in terms], axis=0)
    b = np.concatenate(
        [b if weight == 1 else (b * weight).astype(b.dtype, copy=False) for (_, b), weight in terms], axis=1
    )
    return a, b


def truncate(pair: Pair, *, rank: int | None = None, max_error: float = 0.0) -> tuple[Pair, Spectrum]:
    """The closest pair of lower rank (Eckart, Young 1936), in float64, its singular values shared by both factors.

    With B = Q_B R_B and A^T = Q_A R_A, the singular values of B A are those of the small R_B R_A^T. Keeps `rank`
    directions, or as few as leave a relative error of at most `max_error` (Frobenius); at least one. Directions that are
    nothing but rounding, where terms cancel, count as zero.
    """
    a, b = double(pair)
    q_b, r_b = np.linalg.qr(b)
    q_a, r_a = np.linalg.qr(a.T)
    u, s, vt = np.linalg.svd(r_b @ r_a.T)
    s[s <= rounding(term_scale(pair))] = 0
    squares = s**2
    # tails[k]: what is lost by keeping k directions
    tails = np.concatenate([np.cumsum(squares[::-1])[::-1], [0.0]])
    keep = min(rank, len(s)) if rank else int(np.argmax(tails <= max_error**2 * tails[0]))
    keep = max(keep, 1)
    root = np.sqrt(s[:keep])
    return ((root[:, None] * vt[:keep]) @ q_a.T, q_b @ (u[:, :keep] * root)), Spectrum(
        float(tails[0]), float(tails[keep])
    )


def truncated_svd(delta: Array, rank: int) -> tuple[Pair, Spectrum]:
    """The closest pair of rank `rank` to a dense (outputs, inputs) matrix, by the eigenvectors of its smaller Gram matrix.

    In float64: singular values are right to 1e-8 of the largest.
    """
    dense = delta.astype(np.float64)
    wide = dense.shape[0] <= dense.shape[1]
    values, vectors = np.linalg.eigh(dense @ dense.T if wide else dense.T @ dense)
    keep = min(rank, len(values))
    s = np.sqrt(np.clip(values[::-1][:keep], 0, None))
    basis = vectors[:, ::-1][:, :keep]
    total = float(np.sum(dense**2))
    spectrum = Spectrum(total, max(0.0, total - float(np.sum(s**2))))
    root = np.sqrt(np.where(s > 0, s, 1))
    if wide:  # delta = U U^T delta, on the leading U
        return ((basis.T @ dense) / root[:, None], basis * root), spectrum
    return ((basis * root).T, (dense @ basis) / root), spectrum


def balance(pair: Pair) -> Pair:
    """The same product with rows of A and columns of B of like size, by powers of two: exact, and safe in half precision."""
    a, b = pair
    size_a, size_b = (np.linalg.norm(factor, axis=axis) for factor, axis in zip(double(pair), (1, 0)))
    both = (size_a > 0) & (size_b > 0)
    ratio = np.where(both, size_b, 1) / np.where(both, size_a, 1)
    factor = np.exp2(np.round(np.log2(ratio) / 2)).astype(a.dtype)
    return a * factor[:, None], b / factor


def squared_norm(pair: Pair) -> float:
    """Squared Frobenius norm of B A in float64: as trace((B^T B)(A A^T)), and by QR of the factors where they cancel so far
    that a trace would not resolve it. Right to `rounding`."""
    a, b = double(pair)
    trace = float(np.sum((b.T @ b) * (a @ a.T)))
    if trace > _RESOLVED * term_scale(pair):
        return trace
    r_b, r_a = (np.asarray(np.linalg.qr(factor, mode="r")) for factor in (b, a.T))
    return float(np.sum((r_b @ r_a.T) ** 2))


def term_scale(pair: Pair) -> float:
    """Sum over the rank of |b_k|^2 |a_k|^2: the squared size of what rounding the factors can change in B A."""
    a, b = double(pair)
    return float(np.einsum("ri,ri->r", a, a) @ np.einsum("or,or->r", b, b))


def rounding(size: float) -> float:
    """The Frobenius norm below which a sum of terms of this `term_scale` says nothing, in float64."""
    return _ROUNDING * math.sqrt(size)


def distance(pair: Pair, terms: Sequence[tuple[Pair, float]]) -> float:
    """Squared Frobenius norm of B A - sum of c_i B_i A_i, in float64."""
    return squared_norm(concatenate([(double(pair), 1.0), *((double(term), -weight) for term, weight in terms)]))


def sketch(terms: Sequence[tuple[Pair, float]]) -> Array:
    """U^T (sum of c_i B_i A_i) V with 8 columns of random signs in U and in V, always the same ones: (8, 8), in float64.

    Of two sums, the mean square of the difference of their sketches is an unbiased estimate of their squared `distance`, of a
    relative spread of at most 0.75 (Hutchinson 1989, on both sides). A wrong number anywhere shows, at the cost of a few
    products. Errors of low rank are estimated worst: of a rank 1, one in 80 has a root three times too small, none of 1e5
    one ten times.
    """
    found = np.zeros((PROBES, PROBES))
    for pair, weight in terms:
        a, b = double(pair)
        found += weight * ((_signs(len(b), "outputs").T @ b) @ (a @ _signs(a.shape[1], "inputs")))
    return found


def sketched_norm(sketched: Array) -> float:
    """Squared Frobenius norm of a sum, or a difference, estimated from its sketch."""
    return float(np.mean(np.square(sketched)))


@functools.cache
def _signs(length: int, side: str) -> Array:
    # not by numpy.random, whose import alone would take as long as all the sketches
    bits = np.frombuffer(random.Random(f"{side} {length}").randbytes(length * PROBES // 8), np.uint8)
    signs: Array = 2.0 * np.unpackbits(bits).reshape(length, PROBES) - 1
    return signs
