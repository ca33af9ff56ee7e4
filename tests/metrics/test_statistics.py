"""Means and paired tests against scipy's and numbers by hand."""

import numpy as np
import pytest
from scipy import stats

from fastmem_pl.metrics.statistics import estimate, format_p, paired


def test_a_single_value_has_no_error():
    assert estimate([0.5]).error is None


def test_mean_and_error_are_those_of_scipy_in_any_order():
    values = np.random.default_rng(2).normal(size=1001)
    found = estimate(values.tolist())
    assert found.value == pytest.approx(values.mean(), abs=1e-12)
    assert found.error == pytest.approx(stats.sem(values), abs=1e-12)
    assert found == estimate(values[::-1].tolist()), "another order changes a bit"


def test_binary_scores_take_mcnemars_exact_test():
    found = paired([0, 0, 0, 0, 0, 0, 1, 1], [1, 1, 1, 1, 1, 1, 0, 1], binary=True)
    assert (found.gained, found.lost, found.n) == (6, 1, 8)
    assert found.p_value == pytest.approx(stats.binomtest(6, 7).pvalue)
    assert found.difference == pytest.approx(5 / 8)


@pytest.mark.parametrize(
    ("n", "shift", "spread", "tolerance"),
    [
        *((40, shift, 1.0, 0.025) for shift in (0.0, 0.1, -0.3)),
        *((25_000, shift, 20.0, 0.025) for shift in (0.0, 0.1, -0.3)),
        # As many of 5,000 resamples cross zero, with the noise of counting them.
        *((4000, shift, 1.0, 0.01) for shift in (0.02, 0.03)),
    ],
)
def test_the_bootstrap_agrees_with_the_t_test(n, shift, spread, tolerance):
    random = np.random.default_rng(3)
    before = random.normal(size=n)
    after = before + random.normal(loc=shift, scale=spread, size=n)
    found = paired(before.tolist(), after.tolist(), binary=False)
    assert found.p_value == pytest.approx(stats.ttest_rel(after, before).pvalue, abs=tolerance)
    assert found.difference == pytest.approx((after - before).mean())


def test_the_bootstrap_repeats_itself_and_is_symmetric():
    before, after = [0.1, 0.5, 0.3, 0.9, 0.2, 0.4], [0.3, 0.6, 0.2, 1.0, 0.5, 0.6]
    first = paired(before, after, binary=False)
    assert first == paired(before, after, binary=False)
    assert first.p_value == paired(after, before, binary=False).p_value


@pytest.mark.parametrize("n", [1, 2, 3, 5, 8])
def test_a_few_samples_are_never_surer_than_flipped_signs(n):
    after = [0.1 * (i + 1) for i in range(n)]
    assert paired([0.0] * n, after, binary=False).p_value == pytest.approx(2 ** (1 - n))
    # Samples that did not change are no evidence.
    assert paired([0.0] * n + [0.5], [*after, 0.5], binary=False).p_value >= 2 ** (1 - n)


def test_no_difference_is_certain_of_nothing():
    found = paired([0.5, 0.25], [0.5, 0.25], binary=False)
    assert (found.p_value, found.difference) == (1.0, 0.0)
    assert paired([1, 0], [1, 0], binary=True).p_value == 1.0


def test_small_p_values_are_not_shown_as_zero():
    assert format_p(1e-9) == "p < 0.001"
    assert format_p(0.0449) == "p = 0.045"
