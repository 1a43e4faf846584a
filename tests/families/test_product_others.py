"""A product with families for fields that it does not name, and that come later."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stream_em import Categorical, Field, Gaussian, Mixture, OnlineEM, Poisson, Product, Schema
from stream_em.families import FamilyError, automatic_family, family_from_specification, specification_of_family

KINDS: dict[str, Any] = {
    "x": "numeric",
    "y": "numeric",
    "shop": "category",
    "new": "flag",
    "items": "count",
    "s": "duration",
}


def events(n_events: int, names: list[str], seed: int = 0) -> list[dict[str, Any]]:
    rng = np.random.default_rng(seed)
    whole = [
        {
            "x": float(rng.normal(4.0 * far)),
            "y": float(rng.normal()),
            "shop": "ab"[far],
            "new": bool(rng.random() < 0.5),
            "items": int(rng.poisson(1 + 6 * far)),
            "s": float(rng.exponential(1.0 + far)),
        }
        for far in rng.integers(2, size=n_events).tolist()
    ]
    return [{name: event[name] for name in names} for event in whole]


@pytest.mark.parametrize("others", ["full", "tied", "diag", "spherical"])
def test_the_rest_gets_the_families_that_suit_it(others: Any) -> None:
    schema = Schema({name: KINDS[name] for name in KINDS})
    some = events(300, list(KINDS))
    automatic, stated = (
        OnlineEM(Mixture(family, 2), schema=schema, warm_up=100, seed=0).update(some)
        for family in (Product({}, others=others), automatic_family(schema, others))
    )
    assert np.array_equal(automatic.log_prob(some), stated.log_prob(some))


@given(first=st.lists(st.sampled_from(sorted(KINDS)), min_size=1, unique=True), seed=st.integers(0, 100))
@pytest.mark.parametrize("others", ["full", "tied", "diag", "spherical"])
def test_fields_of_any_kind_may_come_later(others: Any, first: list[str], seed: int) -> None:
    schema = Schema({name: KINDS[name] for name in first}, unknown="add")
    learner = OnlineEM(Mixture(Product({}, others=others), 2), schema=schema, warm_up=100, seed=0)
    learner.update(events(200, first, seed))
    before = learner.log_prob(events(20, first, seed + 1))
    later = Schema([*schema.fields, *(Field(name, KINDS[name]) for name in KINDS if name not in first)], unknown="add")
    learner.grow(later.encode(events(30, list(KINDS), seed), extend=True))
    # What was learned of the first fields is as it was, but for the rounding of a larger covariance. Spherical
    # components have one variance for all fields, and so has their prior, which counts for 0.01 events in 200.
    tolerance = 1e-2 if others == "spherical" else 1e-7
    np.testing.assert_allclose(learner.log_prob(events(20, first, seed + 1)), before, rtol=tolerance, atol=tolerance)
    assert learner.n_events == 200
    learner.update(events(200, list(KINDS), seed + 2))
    assert np.isfinite(learner.log_prob(events(20, list(KINDS), seed + 3))).all()


def test_named_families_stay_theirs_and_a_product_is_data() -> None:
    family = Product({"y": Gaussian("diag"), "items": Poisson()}, others="tied")
    bound = family.bind(tuple(Field(name, KINDS[name]) for name in KINDS))
    assert [(type(factor.family), [one.name for one in factor.fields]) for factor in bound.factors][:4] == [
        (Gaussian, ["y"]),
        (Poisson, ["items"]),
        (Gaussian, ["x"]),
        (Categorical, ["shop"]),
    ]
    assert family_from_specification(specification_of_family(family)) == family
    assert family != Product(family.families)
    with pytest.raises(FamilyError, match="others="):
        Product({"y": Gaussian()}).bind((Field("y", "numeric"), Field("z", "numeric")))
    with pytest.raises(ValueError, match="round"):
        Product({}, others="round")
