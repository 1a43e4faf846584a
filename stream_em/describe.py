"""What sets the components of a mixture apart, field by field."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from stream_em.families import Family
from stream_em.models import MixtureParameters
from stream_em.schema import Schema

# A category that is less probable says nothing of a component: it would be shown as 0%.
LEAST_PROBABILITY = 0.005


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
        Descriptions, by falling absolute effect. A category field is left out where no category that the
        component holds is commoner than in the whole mixture, as when the field was never known there.

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
                probabilities = family.probabilities(parameters.components, position)
                share = weights @ probabilities
                excess = (probabilities[component] - share) / np.sqrt(np.maximum(share * (1.0 - share), 1e-12))
                # Where a component is like the whole, its commonest category says more than the first one.
                alike = excess.max() <= 1e-9
                likely = probabilities[component] >= min(LEAST_PROBABILITY, float(probabilities[component].max()))
                code = int(np.argmax(probabilities[component] if alike else np.where(likely, excess, -np.inf)))
                if not alike and excess[code] <= 0.0:
                    continue
                text = f"{one.label(code)!r} {probabilities[component, code]:.0%}"
                effect = float(excess[code])
            else:
                center, spread = float(mean[component, position]), float(np.sqrt(variance[component, position]))
                effect = (center - float(pooled_mean[position])) / float(pooled[position])
                text = f"true {center:.0%}" if one.kind == "flag" else _rounded(center, spread)
            fields.append(FieldDescription(one.name, text, effect))
        fields.sort(key=lambda described: -abs(described.effect))
        identity = int(parameters.component_ids[component])
        descriptions.append(ComponentDescription(identity, float(weights[component]), fields))
    return descriptions


def _rounded(center: float, spread: float) -> str:
    """Mean and standard deviation, both to two significant digits of the latter."""
    if not 1e-6 <= spread < 1e7 or abs(center) >= 1e12:
        return f"{center:.4g} ± {spread:.2g}"
    decimals = max(0, 1 - int(np.floor(np.log10(spread))))
    return f"{center:z,.{decimals}f} ± {spread:,.{decimals}f}"
