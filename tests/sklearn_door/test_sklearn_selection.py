"""Choosing the number of components and the covariance type."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest
import sklearn.mixture
from matplotlib.axes import Axes

from stream_em.sklearn import GaussianMixture, MixtureModel, select_components

GENERATOR = np.random.default_rng(3)
X = GENERATOR.normal(size=(900, 2)) * [1.0, 3.0] + 12.0 * GENERATOR.integers(3, size=(900, 1))


def test_the_truth_is_found_in_one_call() -> None:
    selection = select_components(X, range(1, 6))
    assert (selection.best.n_components, selection.best.covariance_type) in [(3, "diag"), (3, "tied")]
    table = selection.table.to_pandas()
    assert len(table) == 20
    row = table.loc[table["bic"].idxmin()]
    assert (row["n_components"], row["covariance_type"]) == (3, selection.best.covariance_type)
    np.testing.assert_allclose(row["bic"], selection.best.bic(X), rtol=1e-12)
    np.testing.assert_allclose(row["aic"], selection.best.aic(X), rtol=1e-12)
    np.testing.assert_allclose(row["icl"], selection.best.icl(X), rtol=1e-12)


def test_criteria_are_those_of_scikit_learn_and_of_the_definition() -> None:
    fitted = GaussianMixture(4, random_state=0).fit(X)
    theirs = fitted.to_sklearn()
    found = fitted.criteria(X)
    np.testing.assert_allclose(found.bic, theirs.bic(X), rtol=1e-10)
    np.testing.assert_allclose(found.aic, theirs.aic(X), rtol=1e-10)
    shares = theirs.predict_proba(X)
    entropy = -(shares * np.log(np.maximum(shares, 1e-300))).sum()
    np.testing.assert_allclose(found.icl, found.bic + 2.0 * entropy, rtol=1e-9)


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
def test_icl_counts_clusters_where_bic_counts_gaussians() -> None:
    """Two Gaussians about the same point are one cluster (Biernacki, Celeux & Govaert 2000)."""
    wide = np.where(np.arange(3_000) % 2, 1.0, 2.5)[:, None]
    overlapping = np.random.default_rng(4).normal(size=(3_000, 2)) * wide
    options = {"n_components": range(1, 4), "covariance_types": ["spherical"]}
    by_bic = select_components(overlapping, criterion="bic", **options)
    by_icl = select_components(overlapping, criterion="icl", **options)
    assert (by_bic.best.n_components, by_icl.best.n_components) == (2, 1)


def test_weights_count_as_copies() -> None:
    weight = np.random.default_rng(5).integers(0, 3, size=len(X))
    options: dict[str, Any] = {"n_components": [1, 3], "covariance_types": ["diag"]}
    weighted = select_components(X, sample_weight=weight, **options).table.to_pandas()
    repeated = select_components(np.repeat(X, weight, axis=0), **options).table.to_pandas()
    for name in ("log_likelihood", "bic", "aic"):
        np.testing.assert_allclose(weighted[name], repeated[name], rtol=1e-8)


def test_other_parameters_come_from_the_estimator() -> None:
    frame = pd.DataFrame({"n": np.random.default_rng(6).poisson(np.repeat([2.0, 40.0], 150))})
    estimator = MixtureModel(families={"n": "poisson"}, random_state=0)
    selection = select_components(frame, range(1, 4), covariance_types=["full"], estimator=estimator)
    assert isinstance(selection.best, MixtureModel)
    assert selection.best.n_components == 2
    assert estimator.n_components == 1


def test_the_plot_has_a_line_for_each_covariance_type() -> None:
    selection = select_components(X, [1, 3], covariance_types=["full", "diag"], criterion="aic")
    ax = selection.plot()
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["full", "diag"]
    assert ax.get_ylabel().startswith("AIC")
    shown = dict(zip(ax.lines[1].get_xdata(), ax.lines[1].get_ydata()))
    rows = [row for row in selection.table.to_pylist() if row["covariance_type"] == "diag"]
    assert shown == {row["n_components"]: row["aic"] for row in rows}
    assert isinstance(selection.plot(ax), Axes)


def test_the_estimator_says_its_covariance_type_unless_types_are_given() -> None:
    def types_of(**options: Any) -> list[str]:
        return list(dict.fromkeys(select_components(X, [2], **options).table["covariance_type"].to_pylist()))

    assert types_of() == ["full", "tied", "diag", "spherical"]
    assert types_of(estimator=GaussianMixture(covariance_type="diag", random_state=0)) == ["diag"]
    assert types_of(estimator=MixtureModel(covariance_type="tied", random_state=0)) == ["tied"]
    assert types_of(estimator=GaussianMixture(random_state=0), covariance_types=(one for one in ("tied", "diag"))) == [
        "tied",
        "diag",
    ]


def test_questions_of_the_wrong_type_are_refused() -> None:
    with pytest.raises(
        TypeError, match=r"n_components must be several numbers, such as range\(1, 11\) or \[3\], got 5"
    ):
        select_components(X, 5)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"covariance_types must be a list, such as \['full'\]"):
        select_components(X, [1], covariance_types="full")
    with pytest.raises(TypeError, match=r"sklearn\.mixture\.GaussianMixture, expected a stream_em.*from_sklearn"):
        select_components(X, [1], estimator=sklearn.mixture.GaussianMixture())
    with pytest.raises(TypeError, match=r"int, expected a stream_em\.sklearn\.GaussianMixture or MixtureModel"):
        select_components(X, [1], estimator=3)  # type: ignore[arg-type]


def test_wrong_questions_are_refused() -> None:
    with pytest.raises(ValueError, match="criterion must be one of 'bic', 'aic', 'icl', got 'mdl'"):
        select_components(X, criterion="mdl")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="there is no candidate"):
        select_components(X, [])
    with pytest.raises(ValueError, match="Expected n_samples >= n_components"):
        select_components(X[:3], [5])
