"""What sets the components of a mixture apart, field by field."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from stream_em.families import Categorical, Family, Product
from stream_em.models import MixtureParameters
from stream_em.numerics import Array
from stream_em.schema import Schema


@dataclass(frozen=True)
class FieldDescription:
    """How a component looks in one field.

    Parameters
    ----------
    name
        The field.
    text
        The component in the field's own terms, such as "12.3 ± 0.4" or "'DE' 83%".
    effect
        Distance from the whole mixture: in pooled standard deviations for numbers, for a category the
        difference in probability over its pooled standard deviation.

    """

    name: str
    text: str
    effect: float


@dataclass(frozen=True)
class ComponentDescription:
    """A component with its fields, the most distinguishing first.

    Parameters
    ----------
    id
        Stable id of the component.
    weight
        Mixing weight.
    fields
        Descriptions, by falling absolute effect.

    """

    id: int
    weight: float
    fields: list[FieldDescription]


def describe(family: Family, parameters: MixtureParameters, schema: Schema) -> list[ComponentDescription]:
    """Return the components by falling weight.

    Parameters
    ----------
    family
        The bound family of the mixture.
    parameters
        Parameters of the mixture.
    schema
        Schema that names the fields.

    """
    mean, variance = family.moments(parameters.components)
    weights = parameters.weights
    pooled_mean = weights @ mean
    pooled = np.sqrt(weights @ (variance + (mean - pooled_mean) ** 2))
    descriptions = []
    for component in np.argsort(-weights, kind="stable"):
        fields = []
        for position, one in enumerate(schema.fields):
            if one.kind == "category":
                probabilities = category_probabilities(family, parameters, schema, position)
                share = weights @ probabilities
                excess = (probabilities[component] - share) / np.sqrt(np.maximum(share * (1.0 - share), 1e-12))
                code = int(np.argmax(excess))
                text = f"{one.label(code)!r} {probabilities[component, code]:.0%}"
                effect = float(excess[code])
            else:
                center, spread = float(mean[component, position]), float(np.sqrt(variance[component, position]))
                effect = (center - float(pooled_mean[position])) / float(pooled[position])
                text = f"true {center:.0%}" if one.kind == "flag" else f"{_plain(center, 4)} ± {_plain(spread, 2)}"
            fields.append(FieldDescription(one.name, text, effect))
        fields.sort(key=lambda described: -abs(described.effect))
        identity = int(parameters.component_ids[component])
        descriptions.append(ComponentDescription(identity, float(weights[component]), fields))
    return descriptions


def _plain(number: float, digits: int) -> str:
    """The number with so many significant digits, in powers of ten only where it would be long otherwise."""
    if number == 0.0 or not 1e-4 <= abs(number) < 1e7:
        return f"{number:.{digits}g}"
    return f"{number:,.{max(0, digits - 1 - int(np.floor(np.log10(abs(number)))))}f}"


def category_probabilities(family: Family, parameters: MixtureParameters, schema: Schema, position: int) -> Array:
    """Return the probabilities (K, C) of the codes of the category field at this position of the schema."""
    if isinstance(family, Categorical):
        return family.probabilities(parameters.components, position)
    assert isinstance(family, Product)
    for factor, of_factor in zip(family.factors, parameters.components):
        if isinstance(factor.family, Categorical) and position in factor.positions:
            return factor.family.probabilities(of_factor, int(np.flatnonzero(factor.positions == position)[0]))
    raise ValueError(f"the field {schema.names[position]!r} has no categorical family")
