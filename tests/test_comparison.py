"""Paired comparisons: numbers worked out by hand, coverage, and what must not change them."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.coverage import by_prompt, coverage
from texforce_cli.core.comparison import compare, diversity, holm, interval, signed_rank, unit_means, win_matrix

BASE = {"a": [1.0, 2.0], "b": [3.0, 5.0], "c": [0.0, 0.0]}


def test_the_same_values_give_no_difference_and_p_one() -> None:
    same = compare(BASE, BASE, identical=True)
    assert (same.difference.mean, same.difference.low, same.difference.high) == (0, 0, 0)
    assert (same.p, same.win_rate, same.effect, same.detectable) == (1.0, 0.5, 0.0, 0.0)
    many = {str(i): [float(i)] for i in range(50)}
    assert compare(many, many, identical=True).difference.half_width == 0
    assert compare(many, many).p == 1.0


def test_other_pictures_that_score_the_same_do_not_tell_how_they_vary() -> None:
    tied = compare({"a": [0.5], "b": [0.5]}, {"a": [0.5], "b": [0.5]})  # two votes, both undecided
    assert (tied.difference.mean, tied.difference.half_width, tied.p) == (0, math.inf, 1)
    assert math.isnan(tied.detectable)


def test_prompts_are_counted_and_not_pictures() -> None:
    tuned = {"a": [2.0, 3.0], "b": [6.0, 8.0], "c": [2.0, 2.0]}  # +1, +3, +2
    found = compare(tuned, BASE)
    assert found.difference.mean == 2
    assert found.difference.half_width == pytest.approx(4.303 / math.sqrt(3), rel=1e-4)  # t of 2 degrees, deviation 1
    assert (found.win_rate, found.difference.n, found.effect) == (1.0, 3, 2.0)
    # t of 2 degrees at 97.5 and at 80 %
    assert found.detectable == pytest.approx((4.3027 + 1.0607) / math.sqrt(3), rel=1e-4)
    twice = compare({p: v * 2 for p, v in tuned.items()}, {p: v * 2 for p, v in BASE.items()})
    assert twice.difference == found.difference  # duplicated rounds narrow nothing


def test_one_prompt_counts_its_seeds() -> None:
    found = compare({"a": [2.0, 4.0, 6.0]}, {"a": [1.0, 2.0, 3.0]})
    assert (found.difference.n, found.difference.mean) == (3, 2.0)
    lonely = compare({"a": [2.0]}, {"a": [1.0]})
    assert (lonely.difference.low, lonely.difference.high, lonely.p) == (-math.inf, math.inf, None)


def test_a_difference_that_is_always_the_same_does_not_tell_how_it_varies() -> None:
    found = compare({p: [x + 1 for x in v] for p, v in BASE.items()}, BASE)
    assert (found.difference.low, found.difference.mean, found.difference.high) == (-math.inf, 1, math.inf)
    assert (found.effect, found.p) == (math.inf, 0.25)
    assert math.isnan(found.detectable)
    undecided = compare(
        {"a": [1.0, 0.0], "b": [0.0, 1.0]}, {"a": [0.0, 1.0], "b": [1.0, 0.0]}
    )  # each prompt: a win, a loss
    assert (undecided.difference.mean, undecided.difference.half_width) == (0, math.inf)
    assert interval([1.0] * 30).half_width == interval([0.0, 0.0]).half_width == math.inf  # all won, none won


def test_what_rounding_leaves_is_nothing() -> None:
    """Two greys, 77 and 102, of 30 prompts and three seeds."""
    dark, light = ({str(i): [level / 255] * 3 for i in range(30)} for level in (77, 102))
    found = compare(light, dark)
    assert (found.effect, found.difference.half_width) == (math.inf, math.inf)
    assert found.difference.mean == pytest.approx(25 / 255)
    assert interval(unit_means(dark).tolist()).half_width == math.inf
    stray = {p: [x + 5e-17 * (int(p) % 3) for x in row] for p, row in dark.items()}
    same = compare(stray, dark, identical=True)
    assert (same.difference.mean, same.difference.half_width, same.p, same.win_rate, same.effect) == (0, 0, 1, 0.5, 0)
    assert win_matrix({"a": stray, "b": dark})["a"]["b"] == 0.5


def test_lower_may_be_better() -> None:
    tuned = {p: [x - 1 for x in v] for p, v in BASE.items()}
    assert compare(tuned, BASE, higher_is_better=False).win_rate == 1.0
    assert win_matrix({"base": BASE, "tuned": tuned}, higher_is_better=False)["tuned"]["base"] == 1.0


def test_win_rates_by_hand() -> None:
    one = {"a": [1.0, 1.0], "b": [2.0]}
    two = {"a": [0.0, 1.0], "b": [3.0]}  # prompt a: a win and a tie, prompt b: a loss
    assert win_matrix({"one": one, "two": two}) == {"one": {"two": 0.375}, "two": {"one": 0.625}}


def test_what_does_not_belong_together_is_refused() -> None:
    for other in ({"a": [1.0, 2.0]}, {**BASE, "a": [1.0]}, {}):
        with pytest.raises(ValueError, match="do not belong together"):
            compare(BASE, other)


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.6, 0.7]) == [1.0, 1.0]
    assert holm([]) == []


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_holm_lies_between_the_values_and_bonferroni(values: list[float]) -> None:
    adjusted = holm(values)
    assert all(p <= q <= min(1.0, len(values) * p) + 1e-12 or q == max(adjusted) for p, q in zip(values, adjusted))
    assert np.argsort(values, kind="stable").tolist() == sorted(
        range(len(values)), key=lambda i: (adjusted[i], values[i], i)
    )


def test_signed_rank_against_a_table() -> None:
    """Five differences of one sign: p = 2 / 2^5."""
    assert signed_rank(np.array([1.0, 2.0, 3.0, 4.0, 5.0])) == pytest.approx(0.0625)
    assert signed_rank(np.zeros(9)) == 1.0


@pytest.mark.parametrize("zeros", [0, 9, 10, 100])
def test_signed_rank_is_exact_however_many_prompts_do_not_differ(zeros: int) -> None:
    """Of the 16 signs of four differences, by hand: 2 reach the sum of one sign alone, 4 that with the smallest against it, and of four
    that share their rank 10 reach three against one."""

    def p(*values: float) -> float | None:
        return signed_rank(np.array([*values, *np.zeros(zeros)]))

    assert (p(1, 2, 3, 4), p(1, 1, 1, 1), p(-1, 2, 3, 4)) == (0.125, 0.125, 0.25)
    assert p(1, 1, 1, -1) == 0.625
    assert p(*range(1, 14)) == 2 / 2**13
    assert p(*range(1, 15)) == pytest.approx(2e-4, rel=0.5)  # SciPy's own


@pytest.mark.parametrize("n", [20, 100])
def test_the_interval_covers_what_it_says_with_strong_prompt_effects(n: int) -> None:
    """A short form of benchmarks/coverage.py."""
    rng = np.random.default_rng(n)
    hits = 0
    for trial in range(300):
        difference = rng.exponential(1.0, n) - 1.0 + 0.5  # skewed, true mean 0.5
        found = interval(difference.tolist(), seed=trial)
        hits += found.low <= 0.5 <= found.high
    assert 0.88 <= hits / 300 <= 0.99


def test_the_simulation_compares_as_the_evaluation_does() -> None:
    """20 prompts of 4 pictures: taken one by one, the pictures pass for more than they are."""
    found = coverage(20, skewed=False, trials=150)
    assert found["prompts"]["coverage"] >= 0.9
    assert found["pictures"]["mean width"] < 0.9 * found["prompts"]["mean width"]
    assert set(by_prompt(np.zeros((3, 4)))) == {"0", "1", "2"}


def test_an_effect_that_a_paired_interval_finds_and_an_unpaired_one_misses() -> None:
    rng = np.random.default_rng(0)
    prompts = rng.normal(0, 5, 60)
    base = {str(i): [float(p + e) for e in rng.normal(0, 0.3, 4)] for i, p in enumerate(prompts)}
    tuned = {p: [x + 0.2 + float(rng.normal(0, 0.1)) for x in values] for p, values in base.items()}
    paired = compare(tuned, base).difference
    assert paired.low > 0
    one, two = interval(unit_means(tuned).tolist()), interval(unit_means(base).tolist())
    assert one.low < two.high


def test_the_interval_is_the_same_each_time() -> None:
    values = np.random.default_rng(0).normal(size=30).tolist()
    assert interval(values) == interval(values)


def test_diversity() -> None:
    black, white = np.zeros((64, 64, 3), np.uint8), np.full((64, 64, 3), 255, np.uint8)
    assert diversity([black, black, black]) == 0
    assert diversity([black, white]) == 1
    assert diversity([black, black, white]) == pytest.approx(2 / 3)
    assert diversity([black[:40, :50], white[:40, :50]]) == 1
