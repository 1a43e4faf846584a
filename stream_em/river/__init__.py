"""River's door: online mixtures as a clusterer, an anomaly detector and a transformer.

>>> from river import preprocessing
>>> model = preprocessing.StandardScaler() | MixtureClusterer(n_components=3, seed=0)
>>> model.learn_one({"x": 1.0, "y": 2.0})
>>> model.predict_one({"x": 1.0})
0

"""

from stream_em.river.anomaly import MixtureAnomalyDetector
from stream_em.river.clusterer import MixtureClusterer
from stream_em.river.transformer import MixtureTransformer

__all__ = ["MixtureAnomalyDetector", "MixtureClusterer", "MixtureTransformer"]
