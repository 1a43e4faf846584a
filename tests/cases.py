"""The families under test, with events for them, shared by the engine's tests."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from hypothesis import strategies as st

from stream_em import (
    Batch,
    Bernoulli,
    Categorical,
    Exponential,
    Field,
    Gaussian,
    LinearRegression,
    Mixture,
    MixtureParameters,
    Poisson,
    Product,
    Schema,
    Statistics,
)
from stream_em.families import Family
from stream_em.statistics import Moments, Sums

COUNTRIES = ("DE", "FR", "IT")
PLANS = ("free", "paid")
COVARIANCE_TYPES = ("full", "tied", "diag", "spherical")


@dataclass(frozen=True)
class Case:
    family: Family
    schema: Schema
    always: tuple[str, ...] = ()
    """Fields that are never missing, since the family has no density without them."""


NUMERIC = Schema({"x": "numeric", "y": "numeric", "z": "numeric"})
CASES: dict[str, Case] = {
    **{f"gaussian_{kind}": Case(Gaussian(kind), NUMERIC) for kind in COVARIANCE_TYPES},
    "bernoulli": Case(Bernoulli(), Schema({"a": "flag", "b": "flag", "c": "flag"})),
    "categorical": Case(
        Categorical(),
        Schema([Field("country", "category", COUNTRIES), Field("plan", "category", PLANS)]),
    ),
    "poisson": Case(Poisson(), Schema({"clicks": "count", "buys": "count"})),
    "exponential": Case(Exponential(), Schema({"wait": "duration", "stay": "duration"})),
    # The fields of one family stand apart in the schema, so that their rows are no slice of the block.
    "product": Case(
        Product(
            {
                ("x", "y"): Gaussian("full"),
                "country": Categorical(),
                "z": Gaussian("diag"),
                ("a", "b"): Bernoulli(),
                "clicks": Poisson(),
                "wait": Exponential(),
            }
        ),
        Schema(
            [
                Field("x", "numeric"),
                Field("a", "flag"),
                Field("country", "category", COUNTRIES),
                Field("y", "numeric"),
                Field("clicks", "count"),
                Field("z", "numeric"),
                Field("wait", "duration"),
                Field("b", "flag"),
            ]
        ),
    ),
    "product_tied": Case(
        Product({("x", "y"): Gaussian("tied"), ("u", "v"): Gaussian("spherical")}),
        Schema({"u": "numeric", "x": "numeric", "v": "numeric", "y": "numeric"}),
    ),
    "regression": Case(LinearRegression("y"), NUMERIC, ("x", "z")),
}
# Their density is that of some fields given the others, so that there is none of these alone.
CONDITIONAL_CASES = ["regression"]
COMPILED_CASES = [name for name in CASES if name != "regression"]
GAUSSIAN_CASES = [name for name in CASES if name.startswith("gaussian")]


def draw_values(
    schema: Schema,
    n_events: int,
    generator: np.random.Generator,
    missing: float = 0.0,
    always: tuple[str, ...] = (),
) -> np.ndarray:
    """Events (D, n) in three clusters; each value missing with this probability, never a whole event."""
    cluster = generator.integers(3, size=n_events)
    rows = []
    for position, field in enumerate(schema.fields):
        if field.kind == "numeric":
            rows.append(3.0 * cluster + generator.normal(size=n_events) * (1.0 + 0.3 * position) - 2.0 * position)
        elif field.kind == "flag":
            rows.append((generator.random(n_events) < np.array([0.1, 0.5, 0.9])[cluster]).astype(float))
        elif field.kind == "category":
            shifted = generator.integers(2, size=n_events) + cluster
            rows.append(1.0 + shifted % len(field.categories))
        elif field.kind == "count":
            rows.append(generator.poisson(np.array([0.7, 4.0, 20.0])[cluster]).astype(float))
        else:
            rows.append(generator.exponential(np.array([0.1, 1.0, 30.0])[cluster]))
    values = np.array(rows).reshape(len(schema), n_events)
    if missing and len(schema) > 1:
        gone = generator.random(values.shape) < missing
        gone[generator.integers(len(schema), size=n_events), np.arange(n_events)] = False
        gone[[schema.position(name) for name in always]] = False
        values[gone] = np.nan
    return values


def draw_batch(
    case: Case,
    n_events: int,
    seed: int,
    *,
    missing: float = 0.0,
    weighted: bool = False,
) -> Batch:
    generator = np.random.default_rng(seed)
    values = draw_values(case.schema, n_events, generator, missing, case.always)
    weight = generator.exponential(size=n_events) * generator.integers(2, size=n_events) if weighted else None
    return Batch(values, case.schema, weight)


def draw_parameters(case: Case, n_components: int, seed: int, **options: object) -> tuple[Mixture, MixtureParameters]:
    """A bound model with parameters away from any optimum."""
    generator = np.random.default_rng(seed)
    model = Mixture(case.family, n_components, **options).bind(case.schema)  # type: ignore[arg-type]
    batch = draw_batch(case, 60, seed + 1)
    responsibilities = generator.dirichlet(np.full(n_components, 0.2), size=60).T
    return model, model.initialize(batch, responsibilities)


@st.composite
def batches(draw: st.DrawFn, case: Case, min_events: int = 0, max_events: int = 40) -> Batch:
    """Batches with and without missing values, with and without weights (some of them 0)."""
    return draw_batch(
        case,
        draw(st.integers(min_events, max_events)),
        draw(st.integers(0, 10**6)),
        missing=draw(st.sampled_from([0.0, 0.3, 0.8])),
        weighted=draw(st.booleans()),
    )


def assert_statistics_close(actual: Statistics, expected: Statistics, tolerance: float = 1e-9) -> None:
    """Compare to within `tolerance` per unit of weight, for events of magnitude up to some tens.

    The mean of a component without weight says nothing and is left out.
    """
    assert np.array_equal(actual.component_ids, expected.component_ids)
    assert actual.half_life == expected.half_life
    assert actual.time == expected.time
    assert actual.parts.keys() == expected.parts.keys()
    unit = 1e-3 + expected.total_weight
    np.testing.assert_allclose(actual.log_likelihood, expected.log_likelihood, rtol=1e-9, atol=tolerance * unit)
    for name, wanted in expected.parts.items():
        found = actual.parts[name]
        assert type(found) is type(wanted)
        if isinstance(wanted, Sums):
            assert isinstance(found, Sums)
            np.testing.assert_allclose(found.values, wanted.values, rtol=1e-9, atol=tolerance * unit, err_msg=name)
            continue
        assert isinstance(found, Moments)
        assert isinstance(wanted, Moments)
        np.testing.assert_allclose(found.weight, wanted.weight, rtol=1e-9, atol=tolerance * unit, err_msg=name)
        held = np.broadcast_to(
            (wanted.weight if wanted.weight.ndim == 2 else wanted.weight[:, None]) > 1e-50, wanted.mean.shape
        )
        np.testing.assert_allclose(found.mean[held], wanted.mean[held], rtol=1e-9, atol=100 * tolerance, err_msg=name)
        np.testing.assert_allclose(found.scatter, wanted.scatter, rtol=1e-9, atol=100 * tolerance * unit, err_msg=name)


def assert_parameters_equal(actual: MixtureParameters, expected: MixtureParameters, family: Family) -> None:
    """Compare bit for bit."""
    assert np.array_equal(actual.weights, expected.weights)
    assert np.array_equal(actual.component_ids, expected.component_ids)
    found, wanted = family.arrays(actual.components), family.arrays(expected.components)
    assert found.keys() == wanted.keys()
    for name, array in wanted.items():
        assert np.array_equal(found[name], array), name


def assert_sound(model: Mixture, parameters: MixtureParameters, schema: Schema) -> None:
    """Everything finite, weights a distribution, variances positive, covariances positive definite."""
    assert np.isfinite(parameters.weights).all()
    assert (parameters.weights > 0.0).all()
    np.testing.assert_allclose(parameters.weights.sum(), 1.0, rtol=1e-12)
    family = model.bind(schema).family
    # Reading the arrays back refuses what is not finite, out of range or not positive definite.
    family.from_arrays(family.arrays(parameters.components))
    mean, variance = family.moments(parameters.components)
    assert np.isfinite(mean).all()
    assert np.isfinite(variance).all()
    assert all((row > 0.0).all() for row, field in zip(variance.T, schema.fields) if field.kind != "category")
