"""The scikit-learn door: mixtures that stream, weigh and tolerate gaps, behind scikit-learn's interface."""

from __future__ import annotations

try:
    import sklearn  # noqa: F401 - only to say what is missing
except ModuleNotFoundError as error:
    raise ImportError("stream_em.sklearn needs scikit-learn: pip install 'stream-em[sklearn]'") from error

from stream_em.sklearn.frames import MixtureModel
from stream_em.sklearn.gaussian import GaussianMixture
from stream_em.sklearn.selection import Selection, select_components

__all__ = ["GaussianMixture", "MixtureModel", "Selection", "select_components"]
