from __future__ import annotations

import numpy as np
import pytest
from cases import CASES, draw_batch, draw_parameters

from stream_em import Batch, Categorical, FamilyError, Field, Mixture, Schema

CASE = CASES["categorical"]


@pytest.mark.parametrize("missing", [0.0, 0.5])
def test_log_density_is_the_product_of_the_probabilities(missing: float) -> None:
    model, parameters = draw_parameters(CASE, 3, 1)
    batch = draw_batch(CASE, 50, 2, missing=missing)
    countries, plans = np.split(parameters.components.probability, [4], axis=1)
    for event, found in zip(batch.values.T, model.log_prob(parameters, batch)):
        joint = parameters.weights.copy()
        for table, code in zip((countries, plans), event):
            if not np.isnan(code):
                joint *= table[:, int(code)]
        assert found == pytest.approx(np.log(joint.sum()))


def test_m_step_is_the_weighted_share_with_the_prior_as_pseudo_events() -> None:
    batch = draw_batch(CASE, 80, 3, missing=0.2, weighted=True)
    assert batch.weight is not None
    responsibilities = np.random.default_rng(4).dirichlet(np.ones(2), size=80).T
    shares = responsibilities * batch.weight
    parameters = Mixture(CASE.family, 2, prior_weight=1.5).initialize(batch, responsibilities)
    found = np.split(parameters.components.probability, [4], axis=1)
    for row, n_codes, probability in zip(batch.values, (4, 3), found):
        counts = np.array([(shares * (row == code)).sum(axis=1) for code in range(n_codes)]).T
        # One event, spread evenly over the codes, keeps the pooled share of each above 0.
        pooled = (counts.sum(axis=0) + 1.0 / n_codes) / (counts.sum() + 1.0)
        expected = (counts + 1.5 * pooled) / (counts.sum(axis=1, keepdims=True) + 1.5)
        np.testing.assert_allclose(probability, expected, rtol=1e-10)
        np.testing.assert_allclose(probability.sum(axis=1), 1.0)


def test_missing_is_not_the_other_category() -> None:
    schema = Schema([Field("c", "category", ("a",)), Field("d", "category", ("a",))])
    values = np.array([[0.0, 0.0, np.nan, np.nan], [1.0, 1.0, 1.0, 1.0]])
    model = Mixture(Categorical(), 1).bind(schema)
    parameters = model.initialize(Batch(values, schema), np.ones((1, 4)))
    counts = model.e_step(parameters, Batch(values, schema)).parts["counts"].values
    assert counts.tolist() == [[2.0, 0.0, 0.0, 4.0]]


def test_samples_follow_the_probabilities() -> None:
    model, parameters = draw_parameters(CASE, 2, 5)
    values, components = model.sample(parameters, 40_000, np.random.default_rng(6))
    tables = np.split(parameters.components.probability, [4], axis=1)
    for k in range(2):
        for row, table in zip(values, tables):
            shares = np.bincount(row[components == k].astype(int), minlength=table.shape[1]) / (components == k).sum()
            np.testing.assert_allclose(shares, table[k], atol=0.015)


def test_growing_vocabularies_keep_the_counts_of_each_field() -> None:
    old = Schema([Field("c", "category", ("a",)), Field("d", "category", ("u", "v"))])
    new = Schema(
        [Field("c", "category", ("a", "b", "e")), Field("d", "category", ("u", "v", "w")), Field("f", "category")]
    )
    model = Mixture(Categorical(), 2)
    batch = Batch(np.array([[1.0, 0.0, 1.0], [2.0, 1.0, np.nan]]), old)
    responsibilities = np.array([[1.0, 0.0, 1.0], [0.0, 1.0, 0.0]])
    bound = model.bind(old)
    statistics = bound._expect(bound.pooled(batch), batch, given=responsibilities)[0]
    assert statistics.parts["counts"].values.tolist() == [[0, 2, 0, 0, 1], [1, 0, 0, 1, 0]]
    grown = model.grow(statistics, old, new, Batch(np.array([[1.0], [3.0], [0.0]]), new))
    assert grown.parts["counts"].values.tolist() == [[0, 2, 0, 0, 0, 0, 1, 0, 0], [1, 0, 0, 0, 0, 1, 0, 0, 0]]
    assert grown.weights.tolist() == [2.0, 1.0]


def test_only_categories_suit() -> None:
    with pytest.raises(FamilyError, match="'x' is of kind 'numeric'"):
        Categorical().bind(Schema({"x": "numeric"}).fields)


def test_arrays_that_are_no_parameters_are_refused() -> None:
    family = CASE.family.bind(CASE.schema.fields)
    _, parameters = draw_parameters(CASE, 2, 7)
    probability = parameters.components.probability
    assert np.array_equal(family.from_arrays({"probability": probability}).probability, probability)
    for bad in (
        {},
        {"probability": probability[0]},
        {"probability": probability[:, :-1]},
        {"probability": probability * 0.0},
        {"probability": probability + 1.0},
        {"probability": probability * np.nan},
    ):
        with pytest.raises(ValueError, match="probabilit"):
            family.from_arrays(bad)
