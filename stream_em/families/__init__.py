"""Component families: one file each."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from stream_em.families.base import Family, FamilyError
from stream_em.families.bernoulli import Bernoulli
from stream_em.families.categorical import Categorical
from stream_em.families.exponential import Exponential
from stream_em.families.gaussian import CovarianceType, Gaussian
from stream_em.families.poisson import Poisson
from stream_em.families.product import OF_KIND, Product
from stream_em.families.regression import LinearRegression
from stream_em.schema import KINDS, Kind, Schema

__all__ = [
    "BY_NAME",
    "OF_KIND",
    "Bernoulli",
    "Categorical",
    "Exponential",
    "Family",
    "FamilyError",
    "Gaussian",
    "LinearRegression",
    "Poisson",
    "Product",
    "automatic_family",
    "family_from_specification",
    "kind_for",
    "specification_of_family",
]

BY_NAME: dict[str, type[Family]] = {
    "gaussian": Gaussian,
    "bernoulli": Bernoulli,
    "categorical": Categorical,
    "poisson": Poisson,
    "exponential": Exponential,
}
# Described by a name together with options that have no default.
WITH_OPTIONS: dict[str, type[Family]] = {"linear_regression": LinearRegression}
NAMES = {family: name for name, family in (BY_NAME | WITH_OPTIONS).items()}


def kind_for(family: Family | type[Family], inferred: Kind) -> Kind:
    """Return the kind of a field of this family: the one inferred from its values where the family takes it.

    >>> kind_for(Poisson, "numeric"), kind_for(Gaussian, "flag")
    ('count', 'flag')

    """
    return next(kind for kind in (inferred, *KINDS) if kind in family.kinds)


def automatic_family(schema: Schema, covariance_type: CovarianceType = "full") -> Family:
    """Return the family that suits the kinds of the fields; all numeric fields share one Gaussian.

    >>> automatic_family(Schema({"x": "numeric", "y": "numeric"}))
    Gaussian(covariance_type='full', reg_covar=0.0)
    >>> automatic_family(Schema({"x": "numeric", "clicks": "count"})).names
    ('x', 'clicks')

    """
    numeric = tuple(one.name for one in schema.fields if one.kind == "numeric")
    if len(numeric) == len(schema.fields):
        return Gaussian(covariance_type)
    families: dict[str | tuple[str, ...], Family] = {}
    if numeric:
        families[numeric] = Gaussian(covariance_type)
    families.update({one.name: OF_KIND[one.kind]() for one in schema.fields if one.kind != "numeric"})
    return Product(families)


def specification_of_family(family: Family) -> dict[str, Any]:
    """Return a family as plain data.

    Raises
    ------
    FamilyError
        When the family is not one of this library's.

    >>> specification_of_family(Gaussian("diag"))
    {'family': 'gaussian', 'covariance_type': 'diag', 'reg_covar': 0.0}

    """
    if isinstance(family, Product):
        factors = [
            {"fields": [key] if isinstance(key, str) else list(key), **specification_of_family(one)}
            for key, one in family.families.items()
        ]
        return {"family": "product", "factors": factors} | ({} if family.others is None else {"others": family.others})
    if type(family) not in NAMES:
        raise FamilyError(f"{type(family).__name__} is no family of this library, so it cannot be described as data")
    # What `bind` sets takes no part in comparisons.
    options = {one.name: getattr(family, one.name) for one in fields(family) if one.compare}  # type: ignore[arg-type]
    return {"family": NAMES[type(family)], **options}


def family_from_specification(specification: dict[str, Any]) -> Family:
    """Return the family that `specification_of_family` described.

    Raises
    ------
    FamilyError
        When the name is unknown or an option does not belong to the family.

    >>> family_from_specification({"family": "poisson"})
    Poisson()

    """
    options = dict(specification)
    name = options.pop("family", None)
    if name == "product":
        families: dict[str | tuple[str, ...], Family] = {}
        for factor in options["factors"]:
            of_factor = dict(factor)
            names = tuple(of_factor.pop("fields"))
            families[names] = family_from_specification(of_factor)
        return Product(families, options.get("others"))
    named = BY_NAME | WITH_OPTIONS
    if name not in named:
        raise FamilyError(f"unknown family {name!r}, expected one of {', '.join([*named, 'product'])}")
    try:
        return named[name](**options)
    except TypeError as error:
        raise FamilyError(f"the family {name!r} does not take these options: {error}") from None
