"""Product of families: each field, or group of fields, has a family of its own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Self

import numpy as np
import numpy.typing as npt

from stream_em.families.base import Block, Family, FamilyError, Mask, Parts
from stream_em.families.bernoulli import Bernoulli
from stream_em.families.categorical import Categorical
from stream_em.families.exponential import Exponential
from stream_em.families.gaussian import CovarianceType, Gaussian
from stream_em.families.poisson import Poisson
from stream_em.numerics import Array
from stream_em.schema import KINDS, Field
from stream_em.statistics import Part, Sums

Rows = slice | npt.NDArray[np.intp]

OF_KIND: dict[str, type[Family]] = {
    "category": Categorical,
    "flag": Bernoulli,
    "count": Poisson,
    "duration": Exponential,
}


@dataclass(frozen=True)
class _Factor:
    """One family of a product, with the rows of the block that are its fields.

    Its statistics are filed under its number, or the position of its field, since field names may hold any character
    and neither changes when fields are added.
    """

    name: str
    family: Family
    fields: tuple[Field, ...]
    positions: npt.NDArray[np.intp]

    @property
    def rows(self) -> Rows:
        """The positions, as a slice where they are contiguous, so that no row is copied."""
        first, last = int(self.positions[0]), int(self.positions[-1])
        if np.array_equal(self.positions, np.arange(first, last + 1)):
            return slice(first, last + 1)
        return self.positions


class _ProductBlock(Block):
    """The features of the factors, one after the other."""

    def __init__(self, factors: tuple[_Factor, ...], parameters: tuple[Any, ...], observed: Mask | None) -> None:
        self.factors = [
            (
                factor.name,
                factor.rows,
                factor.family.block(of_factor, None if observed is None else observed[factor.positions]),
            )
            for factor, of_factor in zip(factors, parameters)
        ]
        self.bounds = np.cumsum([0, *(block.n_features for _, _, block in self.factors)])
        self.n_features = int(self.bounds[-1])
        self.has_base_measure = any(block.has_base_measure for _, _, block in self.factors)

    def _spans(self) -> Any:
        return (
            (name, rows, block, slice(start, stop))
            for (name, rows, block), start, stop in zip(self.factors, self.bounds[:-1], self.bounds[1:])
        )

    def natural(self, center: Array) -> tuple[Array, Array]:
        thetas, constants = zip(*(block.natural(center[rows]) for _, rows, block in self.factors))
        return np.concatenate(thetas, axis=1), np.add.reduce(constants)

    def log_density(self, values: Array, observed: Mask | None, component: int) -> Array:
        return sum(
            (
                block.log_density(values[rows], None if observed is None else observed[rows], component)
                for _, rows, block in self.factors
            ),
            start=np.zeros(values.shape[1]),
        )

    def unstable(self, center: Array) -> npt.NDArray[np.intp] | None:
        found = [block.unstable(center[rows]) for _, rows, block in self.factors]
        unstable = [one for one in found if one is not None]
        return np.unique(np.concatenate(unstable)) if unstable else None

    def quadratic_factors(self) -> list[tuple[npt.NDArray[np.intp], bool]] | None:
        factors: list[tuple[npt.NDArray[np.intp], bool]] = []
        for _, rows, block in self.factors:
            of_block = block.quadratic_factors()
            if of_block is None:
                return None
            positions = np.arange(rows.start, rows.stop) if isinstance(rows, slice) else rows
            factors += [(positions[within], full) for within, full in of_block]
        return factors

    def write_features(self, values: Array, center: Array, observed: Mask | None, out: Array) -> None:
        for _, rows, block, span in self._spans():
            block.write_features(values[rows], center[rows], None if observed is None else observed[rows], out[span])

    def base_measure(self, values: Array, observed: Mask | None) -> Array:
        total = np.zeros(values.shape[1])
        for _, rows, block in self.factors:
            if block.has_base_measure:
                total += block.base_measure(values[rows], None if observed is None else observed[rows])
        return total

    def collect(self, sums: Array, weight: Array, centers: Array) -> tuple[Parts, Array | None]:
        parts: dict[str, Part] = {}
        changed: Array | None = None
        for name, rows, block, span in self._spans():
            of_factor, better = block.collect(sums[:, span], weight, centers[:, rows])
            parts.update({f"{name}/{part_name}": part for part_name, part in of_factor.items()})
            if better is not None:
                changed = (
                    np.broadcast_to(centers, (len(better), centers.shape[1])).copy() if changed is None else changed
                )
                changed[:, rows] = better
        return parts, changed


@dataclass(frozen=True)
class Product(Family):
    """Families for fields that are independent of each other within a component.

    Parameters
    ----------
    families
        Mapping of a field name, or a tuple of names that share one family, to the family.
    others
        Covariances of the Gaussian that the numeric fields without a family here share; a field of another kind gets
        the family of its kind. Fields may then be added later on. None: every field must have a family here.
    factors
        The families with their fields; `bind` sets it from the schema.

    Raises
    ------
    FamilyError
        When there is no family, a field has two, or one is itself a product.

    >>> from stream_em.families import Categorical, Gaussian
    >>> product = Product({("x", "y"): Gaussian(), "country": Categorical()})
    >>> product.names
    ('x', 'y', 'country')
    >>> bound = Product({}, others="diag").bind((Field("x", "numeric"), Field("clicks", "count")))
    >>> [type(factor.family).__name__ for factor in bound.factors]
    ['Gaussian', 'Poisson']

    """

    families: Mapping[str | tuple[str, ...], Family]
    others: CovarianceType | None = None
    factors: tuple[_Factor, ...] = field(default=(), repr=False, compare=False)

    kinds: ClassVar[frozenset[str]] = frozenset(KINDS)

    def __post_init__(self) -> None:
        if not self.families and self.others is None:
            raise FamilyError("a product needs at least one family")
        if self.others is not None:
            Gaussian(self.others)
        for key, family in self.families.items():
            if isinstance(family, Product):
                raise FamilyError(f"the family of {key!r} is itself a product; list its fields directly")
            if not isinstance(family, Family):
                raise FamilyError(f"the family of {key!r} is {family!r}, which is no family")
        if len(set(self.names)) != len(self.names):
            raise FamilyError("a field has more than one family: " + ", ".join(map(repr, self.names)))
        # A group of one is written like a single field, so that equal products compare equal.
        single = {
            key[0] if isinstance(key, tuple) and len(key) == 1 else key: one for key, one in self.families.items()
        }
        object.__setattr__(self, "families", single)

    def __hash__(self) -> int:
        return hash((tuple(self.families.items()), self.others))

    @property
    def _factors(self) -> tuple[_Factor, ...]:
        if not self.factors:
            raise FamilyError("the fields are not known yet: bind the model to a schema first")
        return self.factors

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the fields that have a family of their own, in the order of the families."""
        return tuple(name for key in self.families for name in _names(key))

    def bind(self, fields: tuple[Field, ...]) -> Self:  # noqa: D102
        by_name = {one.name: (position, one) for position, one in enumerate(fields)}
        if missing := [name for name in self.names if name not in by_name]:
            raise FamilyError(f"the product has families for {missing}, which are no fields: {sorted(by_name)}")
        named = set(self.names)
        left = [(position, one) for name, (position, one) in by_name.items() if name not in named]
        if left and self.others is None:
            raise FamilyError(
                f"the product has no family for the fields {[one.name for _, one in left]}: name one, or say with "
                "others= what the fields without one get"
            )
        factors = [
            _factor(str(index), family, [by_name[name] for name in _names(key)])
            for index, (key, family) in enumerate(self.families.items())
        ]
        if numeric := [(position, one) for position, one in left if one.kind == "numeric"]:
            assert self.others is not None
            factors.append(_factor("numeric", Gaussian(self.others), numeric))
        factors += [
            _factor(f"field{position}", OF_KIND[one.kind](), [(position, one)])
            for position, one in left
            if one.kind != "numeric"
        ]
        return replace(self, factors=tuple(factors))

    def joint_fields(self, n_fields: int) -> Mask:  # noqa: D102
        mask = np.zeros(n_fields, dtype=bool)
        for factor in self._factors:
            mask[factor.positions] = factor.family.joint_fields(len(factor.positions))
        return mask

    def lacking(self, observed: Mask) -> Mask | None:  # noqa: D102
        lacking: Mask | None = None
        for factor in self._factors:
            of_factor = factor.family.lacking(observed[factor.rows])
            if of_factor is not None:
                lacking = np.zeros_like(observed) if lacking is None else lacking
                lacking[factor.rows] = of_factor
        return lacking

    def block(self, parameters: tuple[Any, ...], observed: Mask | None) -> Block:  # noqa: D102
        return _ProductBlock(self._factors, parameters, observed)

    def pooled(self, values: Array, weight: Array, n_components: int) -> tuple[Any, ...]:  # noqa: D102
        return tuple(factor.family.pooled(values[factor.rows], weight, n_components) for factor in self._factors)

    def prior(self, parts: Parts, prior_weight: float) -> tuple[Any, ...]:  # noqa: D102
        return tuple(factor.family.prior(_parts_of(parts, factor), prior_weight) for factor in self._factors)

    def maximize(self, parts: Parts, prior: tuple[Any, ...]) -> tuple[Any, ...]:  # noqa: D102
        return tuple(
            factor.family.maximize(_parts_of(parts, factor), of_prior) for factor, of_prior in zip(self._factors, prior)
        )

    def keep(self, new: tuple[Any, ...], old: tuple[Any, ...], kept: Mask) -> tuple[Any, ...]:  # noqa: D102
        return tuple(factor.family.keep(*pair, kept) for factor, pair in zip(self._factors, zip(new, old)))

    def log_prior(self, parameters: tuple[Any, ...], prior: tuple[Any, ...]) -> float:  # noqa: D102
        return sum(
            factor.family.log_prior(of_factor, of_prior)
            for factor, of_factor, of_prior in zip(self._factors, parameters, prior)
        )

    def start(  # noqa: D102
        self, values: Array, weight: Array, n_components: int, generator: np.random.Generator
    ) -> Array | None:
        starts = (factor.family.start(values[factor.rows], weight, n_components, generator) for factor in self._factors)
        return next((start for start in starts if start is not None), None)

    def moments(self, parameters: tuple[Any, ...]) -> tuple[Array, Array]:  # noqa: D102
        pairs = [factor.family.moments(of_factor) for factor, of_factor in zip(self._factors, parameters)]
        shape = (len(pairs[0][0]), sum(len(factor.positions) for factor in self._factors))
        mean, variance = np.empty(shape), np.empty(shape)
        for factor, (of_mean, of_variance) in zip(self._factors, pairs):
            mean[:, factor.positions], variance[:, factor.positions] = of_mean, of_variance
        return mean, variance

    def sample(  # noqa: D102
        self, parameters: tuple[Any, ...], components: npt.NDArray[np.intp], generator: np.random.Generator
    ) -> Array:
        values = np.empty((sum(len(factor.positions) for factor in self._factors), len(components)))
        for factor, of_factor in zip(self._factors, parameters):
            values[factor.positions] = factor.family.sample(of_factor, components, generator)
        return values

    def covariance(self, parameters: tuple[Any, ...], first: int, second: int) -> Array:  # noqa: D102
        index, within = self._place(first)
        other, position = self._place(second)
        if index != other:
            return super().covariance(parameters, first, second)
        return self._factors[index].family.covariance(parameters[index], within, position)

    def probabilities(self, parameters: tuple[Any, ...], position: int) -> Array:  # noqa: D102
        index, within = self._place(position)
        return self._factors[index].family.probabilities(parameters[index], within)

    def _place(self, position: int) -> tuple[int, int]:
        """Return the factor of a field, and the field's position in it."""
        for index, factor in enumerate(self._factors):
            (found,) = np.nonzero(factor.positions == position)
            if len(found):
                return index, int(found[0])
        raise FamilyError(f"there is no field at position {position}")

    def restrict(self, keep: npt.NDArray[np.intp]) -> Product:  # noqa: D102
        families: dict[str | tuple[str, ...], Family] = {}
        for key, factor in zip(self.families, self._factors):
            within = np.flatnonzero(np.isin(factor.positions, keep))
            if len(within):
                families[tuple(_names(key)[position] for position in within)] = factor.family.restrict(within)
        return Product(families, self.others)

    def marginal(self, parameters: tuple[Any, ...], keep: npt.NDArray[np.intp]) -> tuple[Any, ...]:  # noqa: D102
        fields = {position: one for factor in self._factors for one, position in zip(factor.fields, factor.positions)}
        where = dict(place for factor in self._factors for place in _places(factor))
        factors = self.restrict(keep).bind(tuple(fields[position] for position in keep.tolist())).factors
        marginals = []
        for factor in factors:
            places = [self._place(where[one.name]) for one in factor.fields]
            index = places[0][0]
            within = np.array([position for _, position in places], dtype=np.intp)
            marginals.append(self._factors[index].family.marginal(parameters[index], within))
        return tuple(marginals)

    def conditional(  # noqa: D102
        self, parameters: tuple[Any, ...], given: npt.NDArray[np.intp], values: Array
    ) -> tuple[Any, ...]:
        left = []
        for factor, of_factor in zip(self._factors, parameters):
            _, within, among = np.intersect1d(factor.positions, given, return_indices=True)
            if len(within) == 0:
                left.append(of_factor)
            elif len(within) < len(factor.positions):
                left.append(factor.family.conditional(of_factor, within, values[among]))
        return tuple(left)

    def n_parameters(self, n_fields: int, n_components: int) -> int:  # noqa: D102
        return sum(factor.family.n_parameters(len(factor.positions), n_components) for factor in self._factors)

    def grow(  # noqa: D102
        self, parts: Parts, old: tuple[Field, ...], new: tuple[Field, ...], pooled: tuple[Any, ...]
    ) -> Parts:
        grown: dict[str, Any] = {}
        for factor, of_factor in zip(self._factors, pooled):
            old_fields = tuple(old[position] for position in factor.positions if position < len(old))
            if old_fields:
                of_parts = factor.family.grow(_parts_of(parts, factor), old_fields, factor.fields, of_factor)
            else:
                weights = parts["components"]
                assert isinstance(weights, Sums)
                of_parts = _never_held(factor, of_factor, weights.values)
            grown.update({f"{factor.name}/{name}": part for name, part in of_parts.items()})
        return grown

    def settle(self, parts: Parts, positions: npt.NDArray[np.intp], pooled: tuple[Any, ...]) -> Parts:  # noqa: D102
        settled: dict[str, Any] = {}
        for factor, of_factor in zip(self._factors, pooled):
            (within,) = np.nonzero(np.isin(factor.positions, positions))
            of_parts = factor.family.settle(_parts_of(parts, factor), within, of_factor)
            settled.update({f"{factor.name}/{name}": part for name, part in of_parts.items()})
        return settled

    def arrays(self, parameters: tuple[Any, ...]) -> dict[str, Array]:  # noqa: D102
        return {
            f"{factor.name}/{name}": array
            for factor, of_factor in zip(self._factors, parameters)
            for name, array in factor.family.arrays(of_factor).items()
        }

    def from_arrays(self, arrays: Mapping[str, Array]) -> tuple[Any, ...]:  # noqa: D102
        return tuple(factor.family.from_arrays(_parts_of(arrays, factor)) for factor in self._factors)


def _factor(name: str, family: Family, chosen: list[tuple[int, Field]]) -> _Factor:
    fields = tuple(one for _, one in chosen)
    positions = np.array([position for position, _ in chosen], dtype=np.intp)
    return _Factor(name, family.bind(fields), fields, positions)


def _never_held(factor: _Factor, pooled: Any, weights: Array) -> Parts:
    """Return the factor's statistics of events of these weights (K,) that held none of its fields."""
    n_fields = len(factor.positions)
    block = factor.family.block(pooled, np.zeros(n_fields, dtype=bool))
    return block.collect(np.zeros((len(weights), block.n_features)), weights, np.zeros((1, n_fields)))[0]


def _places(factor: _Factor) -> list[tuple[str, int]]:
    return [(one.name, position) for one, position in zip(factor.fields, factor.positions.tolist())]


def _names(key: str | tuple[str, ...]) -> tuple[str, ...]:
    return (key,) if isinstance(key, str) else key


def _parts_of(parts: Mapping[str, Any], factor: _Factor) -> dict[str, Any]:
    prefix = factor.name + "/"
    return {name[len(prefix) :]: part for name, part in parts.items() if name.startswith(prefix)}
