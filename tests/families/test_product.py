from __future__ import annotations

import numpy as np
import pytest
from cases import CASES, draw_batch

from stream_em import (
    Batch,
    Bernoulli,
    Categorical,
    Exponential,
    FamilyError,
    Gaussian,
    Mixture,
    Poisson,
    Product,
    Schema,
)
from stream_em.families import Family, automatic_family, family_from_specification, specification_of_family

SCHEMA = CASES["product"].schema


@pytest.mark.parametrize("missing", [0.0, 0.3])
def test_log_density_is_the_sum_over_the_factors(missing: float) -> None:
    case = CASES["product"]
    assert isinstance(case.family, Product)
    batch = draw_batch(case, 60, 1, missing=missing)
    model = Mixture(case.family, 1).bind(SCHEMA)
    parameters = model.initialize(batch, np.ones((1, 60)))
    total = np.zeros(60)
    for key, family in case.family.families.items():
        names = (key,) if isinstance(key, str) else key
        rows = [SCHEMA.position(name) for name in names]
        part = Batch(batch.values[rows], Schema([SCHEMA.fields[row] for row in rows]))
        alone = Mixture(family, 1).bind(part.schema)
        total += alone.log_prob(alone.initialize(part, np.ones((1, 60))), part)
    np.testing.assert_allclose(model.log_prob(parameters, batch), total, rtol=1e-9)


def test_a_product_of_gaussians_by_field_is_a_diagonal_gaussian() -> None:
    schema = CASES["gaussian_diag"].schema
    responsibilities = np.random.default_rng(3).dirichlet(np.ones(3), size=100).T
    # Without gaps: a full factor takes the other fields' word for a missing value, a diagonal one leaves it out.
    full = draw_batch(CASES["gaussian_diag"], 100, 2)
    results = []
    for family in (Gaussian("diag"), Product({name: Gaussian("full") for name in schema.names})):
        model = Mixture(family, 3).bind(schema)
        parameters = model.m_step(model.e_step(model.initialize(full, responsibilities), full))
        results.append(model.log_prob(parameters, full))
    np.testing.assert_allclose(results[1], results[0], rtol=1e-9)


@pytest.mark.parametrize(
    ("families", "reason"),
    [
        ({}, "at least one family"),
        ({"x": Gaussian(), ("x", "y"): Gaussian()}, "more than one family"),
        ({"x": Product({"x": Gaussian()})}, "itself a product"),
        ({"x": "gaussian"}, "no family"),
        ({"x": Gaussian}, "no family"),
    ],
)
def test_wrong_products_are_refused(families: dict[object, object], reason: str) -> None:
    with pytest.raises(FamilyError, match=reason):
        Product(families)  # type: ignore[arg-type]


def test_every_field_has_a_family() -> None:
    schema = Schema({"x": "numeric", "n": "count"})
    with pytest.raises(FamilyError, match=r"no family for the fields \['n'\]"):
        Product({"x": Gaussian()}).bind(schema.fields)
    with pytest.raises(FamilyError, match=r"\['z'\], which are no fields"):
        Product({"x": Gaussian(), "n": Poisson(), "z": Poisson()}).bind(schema.fields)
    with pytest.raises(FamilyError, match="'x' is of kind 'numeric'"):
        Product({"x": Poisson(), "n": Poisson()}).bind(schema.fields)


def test_a_product_cannot_take_new_fields() -> None:
    old, new = Schema({"x": "numeric"}), Schema({"x": "numeric", "y": "numeric"})
    model = Mixture(Product({"x": Gaussian()}), 1)
    with pytest.raises(FamilyError, match="y"):
        model.bind(new)
    batch = Batch(np.ones((1, 3)), old)
    assert model.bind(old).pooled(batch).weights.tolist() == [1.0]


def test_the_family_that_suits_the_fields() -> None:
    assert automatic_family(Schema({"x": "numeric", "y": "numeric"}), "tied") == Gaussian("tied")
    family = automatic_family(SCHEMA, "diag")
    assert isinstance(family, Product)
    assert family.families == {
        ("x", "y", "z"): Gaussian("diag"),
        "a": Bernoulli(),
        "country": Categorical(),
        "clicks": Poisson(),
        "wait": Exponential(),
        "b": Bernoulli(),
    }
    family.bind(SCHEMA.fields)
    assert automatic_family(Schema({"b": "flag"})) == Product({"b": Bernoulli()})


@pytest.mark.parametrize("family", [case.family for case in CASES.values()])
def test_specifications_are_read_back(family: Family) -> None:
    assert family_from_specification(specification_of_family(family)) == family


@pytest.mark.parametrize(
    ("specification", "reason"),
    [
        ({"family": "normal"}, "unknown family 'normal', expected one of gaussian"),
        ({}, "unknown family None"),
        ({"family": "gaussian", "covariance": "full"}, "does not take these options"),
        ({"family": "gaussian", "covariance_type": "round"}, "covariance_type"),
        ({"family": "poisson", "rate": 3}, "does not take these options"),
    ],
)
def test_wrong_specifications_are_refused(specification: dict[str, object], reason: str) -> None:
    with pytest.raises(FamilyError, match=reason):
        family_from_specification(specification)
