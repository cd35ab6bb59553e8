"""Linear regression: everything that is measured is known beforehand."""

import pandas as pd
import pytest
import torch

from examples.paper.linear import LINEAR_RUNS, LinearRun, linear_tables, measure_linear


@pytest.mark.parametrize("run", LINEAR_RUNS)
def test_index_nullity_and_the_factor_2(run):
    record = measure_linear(run)
    assert record["index"] == record["bound"] == 0
    assert record["nullity"] == record["expected_nullity"]
    if run.rank is not None:
        assert record["rank_of_X"] == run.rank
        assert record["expected_nullity"] == (0 if run.l2 else run.features - run.rank)
    # Each entry of H is a sum over the examples, in another order.
    assert record["relative_error"] <= run.examples * torch.finfo(torch.float64).eps
    assert record["relative_error_without_2"] == pytest.approx(0.5)
    # A critical point, to the round-off of a gradient that is a sum over the examples.
    assert record["grad_norm"] <= 1e-12 * record["norm"]


def test_eigenvalues_of_a_regression_solved_by_hand():
    # A single feature: f = Σ (xᵢ w − yᵢ)² + λ w², f'' = 2 Σ xᵢ² + 2 λ.
    plain = measure_linear(LinearRun(data="gaussian", examples=9, features=1, rank=1))
    regular = measure_linear(LinearRun(data="gaussian", examples=9, features=1, rank=1, l2=0.25))
    assert regular["norm"] - plain["norm"] == pytest.approx(0.5)


def test_the_table():
    line = {**vars(LINEAR_RUNS[1]), **measure_linear(LINEAR_RUNS[1])}
    (table,) = linear_tables(pd.DataFrame([line]))
    (shown,) = table.frame.to_dict("records")
    assert (shown["size"], shown["rank"], shown["index"], shown["nullity"]) == (
        *("200 × 40", "25"),
        *("0", "15"),
    )
    assert shown["H against XᵀX + λI"] == "0.500"
