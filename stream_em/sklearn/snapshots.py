"""Between learners, which snapshots hold, and the parameters of the estimators."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

from stream_em.families import Family, Gaussian, Product, family_from_specification, specification_of_family
from stream_em.learners import OnlineEM
from stream_em.models import MixtureParameters
from stream_em.schedules import Constant, Harmonic, RobbinsMonro
from stream_em.store import SnapshotError

# Under which a snapshot's metadata hold what is the estimator's and not the learner's.
METADATA_KEY = "stream_em.sklearn"


def check_kept(kept: Any, params: Collection[str], source: str) -> None:
    """Refuse metadata that no estimator with these parameters wrote.

    Raises
    ------
    SnapshotError
        With the name of what is wrong.

    """
    found = kept if isinstance(kept, dict) else {}
    attributes = found.get("attributes")
    attributes = attributes if isinstance(attributes, dict) else {}
    bounds = attributes.get("lower_bounds_")
    sound = {
        "params": isinstance(found.get("params"), dict) and found["params"].keys() == set(params),
        "dtype": found.get("dtype") in ("float32", "float64"),
        "named": type(found.get("named")) is bool,
        "converged_": type(attributes.get("converged_", False)) is bool,
        "n_iter_": type(attributes.get("n_iter_", 0)) is int,
        "n_samples_seen_": type(attributes.get("n_samples_seen_", 0)) is int,
        "lower_bound_": type(attributes.get("lower_bound_", 0.0)) in (int, float),
        "lower_bounds_": isinstance(bounds, list) and all(type(one) in (int, float) for one in bounds),
    }
    for name, is_sound in sound.items():
        if not is_sound:
            raise SnapshotError(
                f"{source}: no estimator of this version wrote {name!r} of the metadata {METADATA_KEY!r}; to go on "
                "without them, save the learner alone: stream_em.save(stream_em.load(path), path)"
            )


def pace_of(learner: OnlineEM) -> dict[str, Any]:
    """Return the parameters by which `partial_fit` goes on as the learner would.

    >>> from stream_em import Mixture
    >>> pace_of(OnlineEM(Mixture(Gaussian(), 2), schedule=Constant(0.1), warm_up=50))
    {'batch_size': 1000, 'warm_up': 50, 'step_size': 0.1}

    """
    # `warm_up` stands for both: where parameters were given and not learned, the second is still to come.
    is_given = not (learner.warming_up or learner._state.n_updates)
    rows = learner.first_m_step if is_given else learner.warm_up
    pace: dict[str, Any] = {"batch_size": learner.batch_size, "warm_up": rows}
    schedule = learner.schedule
    if isinstance(schedule, Constant):
        pace["step_size"] = schedule.value
    elif isinstance(schedule, Harmonic):
        pace["step_size"] = "harmonic"
    elif isinstance(schedule, RobbinsMonro):
        pace.update(step_exponent=schedule.alpha, step_offset=schedule.offset)
    return pace


def over_one_gaussian(learner: OnlineEM, source: str) -> OnlineEM:
    """Return the learner with a Gaussian over all its fields for its family; a product of that alone is unwrapped.

    Raises
    ------
    ValueError
        When its components are no Gaussians over numeric fields, or it learned in a way that has no parameter.

    """
    schema, family = learner._known_schema(), learner._bound_model().family
    factors = family.factors if isinstance(family, Product) else ()
    gaussian = factors[0].family if len(factors) == 1 else family
    ways = [name for name in ("averaging", "window", "structure", "truncation") if getattr(learner, name)]
    in_order = not factors or factors[0].positions.tolist() == list(range(len(schema)))
    numeric = all(one.kind == "numeric" for one in schema.fields)
    if not isinstance(gaussian, Gaussian) or not in_order or not numeric or ways:
        kinds = ", ".join(f"{one.name!r} ({one.kind})" for one in schema.fields)
        raise ValueError(
            f"{source}: the snapshot holds {learner.model} of the fields {kinds}"
            f"{', learned with ' + ' and '.join(ways) if ways else ''}, and a GaussianMixture has Gaussian components "
            "of one covariance type over numeric fields in their order, without averaging, window, structure or "
            "truncation; MixtureModel.from_snapshot takes any"
        )
    if not factors:
        return learner

    def unwrapped(parameters: MixtureParameters | None) -> MixtureParameters | None:
        return None if parameters is None else replace(parameters, components=parameters.components[0])

    state, prefix = learner._state, f"{factors[0].name}/"
    statistics = state.statistics
    if statistics is not None:
        parts = {name.removeprefix(prefix): part for name, part in statistics.parts.items()}
        statistics = replace(statistics, parts=parts)
    model = replace(learner.model, family=Gaussian(gaussian.covariance_type, gaussian.reg_covar))
    made = OnlineEM(model, schema=schema, **{name: getattr(learner, name) for name in learner.OPTIONS})
    made._state = replace(state, statistics=statistics, iterate=unwrapped(state.iterate))
    made._parameters = made._state.iterate
    for name in ("_buffer", "_unseen", "_clock", "ignored_fields", "origin"):
        setattr(made, name, getattr(learner, name))
    return made


def default_names(n_fields: int) -> tuple[str, ...]:
    """Return the names of the columns of an array."""
    return tuple(f"x{column}" for column in range(n_fields))


def plain_families(families: Mapping[Any, str | Family] | Family | None) -> Any:
    """Return the parameter `families` as plain data.

    >>> plain_families({("a", "b"): Gaussian("diag"), "c": "poisson"})
    [[['a', 'b'], {'family': 'gaussian', 'covariance_type': 'diag', 'reg_covar': 0.0}], ['c', 'poisson']]

    """
    if families is None:
        return None
    if isinstance(families, Family):
        return specification_of_family(families)
    return [
        [list(key) if isinstance(key, tuple) else key, one if isinstance(one, str) else specification_of_family(one)]
        for key, one in families.items()
    ]


def families_from_plain(plain: Any) -> dict[Any, str | Family] | Family | None:
    """Return the `families` that `plain_families` described.

    Raises
    ------
    SnapshotError
        When it described none.

    """
    if plain is None:
        return None
    if isinstance(plain, dict):
        return family_from_specification(plain)
    try:
        pairs = [(tuple(key) if isinstance(key, list) else key, one) for key, one in plain]
    except (TypeError, ValueError) as error:
        raise SnapshotError(f"the snapshot names families by {plain!r}, which are no pairs") from error
    return {key: one if isinstance(one, str) else family_from_specification(one) for key, one in pairs}
