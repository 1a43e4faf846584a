"""Choose the number of components and the covariance type by an information criterion."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import sklearn.mixture
from sklearn.base import clone
from sklearn.utils.validation import _num_samples

from stream_em.sklearn.base import class_of, weights_of
from stream_em.sklearn.frames import MixtureModel
from stream_em.sklearn.gaussian import GaussianMixture

if TYPE_CHECKING:
    from matplotlib.axes import Axes

CRITERIA = ("bic", "aic", "icl")
ALL_TYPES = ("full", "tied", "diag", "spherical")


@dataclass(frozen=True)
class Selection:
    """What `select_components` found.

    Parameters
    ----------
    table : pyarrow.Table
        One row for each candidate: n_components, covariance_type, log_likelihood, n_parameters, bic, aic, icl,
        converged and n_iter.
    best : GaussianMixture or MixtureModel
        The fitted candidate with the lowest criterion.
    criterion : {'bic', 'aic', 'icl'}
        The criterion.

    """

    table: pa.Table
    best: Any
    criterion: Literal["bic", "aic", "icl"]

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw the criterion over the number of components, one line for each covariance type.

        Parameters
        ----------
        ax : matplotlib.axes.Axes, default=None
            Where to draw; a new figure when None.

        Returns
        -------
        ax : matplotlib.axes.Axes
            The axes.

        """
        if ax is None:
            from matplotlib.figure import Figure

            ax = Figure(layout="constrained").subplots()
        rows = self.table.to_pylist()
        for covariance_type in dict.fromkeys(row["covariance_type"] for row in rows):
            line = [row for row in rows if row["covariance_type"] == covariance_type]
            ax.plot(
                [row["n_components"] for row in line],
                [row[self.criterion] for row in line],
                marker="o",
                label=covariance_type,
            )
        best = min(rows, key=lambda row: float(row[self.criterion]))
        ax.plot(best["n_components"], best[self.criterion], "o", markersize=14, fillstyle="none", color="black")
        ax.set_xlabel("components")
        ax.set_ylabel(f"{self.criterion.upper()} (lower is better)")
        ax.legend(title="covariance")
        return ax


def select_components(
    X: Any,
    n_components: Iterable[int] = range(1, 11),
    *,
    covariance_types: Iterable[str] | None = None,
    criterion: Literal["bic", "aic", "icl"] = "bic",
    estimator: GaussianMixture | MixtureModel | None = None,
    sample_weight: npt.ArrayLike | None = None,
) -> Selection:
    """Fit a mixture for each number of components and covariance type, and choose by a criterion.

    Parameters
    ----------
    X : array-like of shape (n_samples, n_features)
        The data.
    n_components : iterable of int, default=range(1, 11)
        Numbers of components.
    covariance_types : iterable of str, default=None
        Covariance types; None for that of the estimator, and for all four where there is no estimator.
    criterion : {'bic', 'aic', 'icl'}, default='bic'
        BIC (Schwarz 1978) finds the density; ICL (Biernacki, Celeux & Govaert 2000), which is BIC plus twice
        the entropy of the soft clusters, finds clusters that lie apart; AIC (Akaike 1974) predicts.
    estimator : GaussianMixture or MixtureModel, default=None
        Its other parameters are those of every candidate; `GaussianMixture(random_state=0)` by default.
    sample_weight : array-like of shape (n_samples,), default=None
        Weights of the samples.

    Returns
    -------
    selection : Selection
        With `table`, `best` and `plot()`.

    Raises
    ------
    TypeError
        When `n_components` or `covariance_types` is a single one, or the estimator is not of this library.
    ValueError
        When the criterion is unknown, or there is no candidate.

    Examples
    --------
    >>> import numpy as np
    >>> from stream_em.sklearn import select_components
    >>> generator = np.random.default_rng(0)
    >>> X = generator.normal(size=(600, 2)) + 9.0 * generator.integers(3, size=(600, 1))
    >>> selection = select_components(X, range(1, 5), covariance_types=["full", "spherical"])
    >>> selection.best.n_components, selection.best.covariance_type
    (3, 'spherical')
    >>> selection.table.num_rows
    8

    """
    if criterion not in CRITERIA:
        raise ValueError(f"criterion must be one of {', '.join(map(repr, CRITERIA))}, got {criterion!r}")
    if not isinstance(n_components, Iterable):
        raise TypeError(f"n_components must be several numbers, such as range(1, 11) or [3], got {n_components!r}")
    if isinstance(covariance_types, str):
        raise TypeError(f"covariance_types must be a list, such as [{covariance_types!r}], got {covariance_types!r}")
    template = GaussianMixture(random_state=0) if estimator is None else _checked(estimator)
    numbers = list(n_components)
    if covariance_types is None:
        covariance_types = ALL_TYPES if estimator is None else (template.covariance_type,)
    covariance_types = list(covariance_types)
    weights = weights_of(sample_weight, np.empty(_num_samples(X)))
    rows: list[dict[str, Any]] = []
    best: tuple[float, Any] | None = None
    for covariance_type in covariance_types:
        for number in numbers:
            candidate = clone(template).set_params(n_components=number, covariance_type=covariance_type)
            found = candidate.fit(X, sample_weight=weights).criteria(X, weights)._asdict()
            named = {"n_components": number, "covariance_type": covariance_type}
            rows.append({**named, **found, "converged": candidate.converged_, "n_iter": candidate.n_iter_})
            if best is None or found[criterion] < best[0]:
                best = found[criterion], candidate
    if best is None:
        raise ValueError("there is no candidate: n_components and covariance_types must name at least one each")
    return Selection(pa.Table.from_pylist(rows), best[1], criterion)


def _checked(estimator: Any) -> GaussianMixture | MixtureModel:
    if isinstance(estimator, GaussianMixture | MixtureModel):
        return estimator
    hint = "stream_em.sklearn.GaussianMixture or MixtureModel"
    if isinstance(estimator, sklearn.mixture.GaussianMixture):
        hint = "stream_em.sklearn.GaussianMixture, which takes the same parameters (from_sklearn converts a fitted one)"
    raise TypeError(f"estimator is a {class_of(estimator)}, expected a {hint}")
