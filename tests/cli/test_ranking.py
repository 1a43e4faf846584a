"""ROC-AUC: known answers, and bounded error once scores are counted in bins."""

import numpy as np
import pytest

from stream_em.cli.ranking import RankingScore

roc_auc_score = pytest.importorskip("sklearn.metrics").roc_auc_score


def sample(n, seed, ties):
    generator = np.random.default_rng(seed)
    anomalous = generator.random(n) < 0.1
    scores = generator.normal(size=n) + 1.5 * anomalous
    return (np.round(scores, 1) if ties else scores), anomalous


def added_in_pieces(score, scores, anomalous, size):
    for start in range(0, len(scores), size):
        score.add(scores[start : start + size], anomalous[start : start + size])
    return score


@pytest.mark.parametrize("ties", [False, True])
def test_it_is_exact_up_to_the_limit(ties):
    scores, anomalous = sample(5_000, 0, ties)
    score = added_in_pieces(RankingScore(), scores, anomalous, 700)
    assert score.area == pytest.approx(roc_auc_score(anomalous, scores), rel=1e-12)
    assert score.bound == 0.0


@pytest.mark.parametrize("ties", [False, True])
def test_beyond_the_limit_the_error_keeps_its_bound_even_when_scores_drift(ties):
    scores, anomalous = sample(200_000, 1, ties)
    scores += np.linspace(0.0, 1.0, len(scores))
    score = added_in_pieces(RankingScore(exact_limit=20_000), scores, anomalous, 1_000)
    assert 0.0 < score.bound < 0.02
    assert abs(score.area - roc_auc_score(anomalous, scores)) <= score.bound


def test_it_is_undefined_without_both_sorts_of_events():
    score = RankingScore()
    assert np.isnan(score.area)
    score.add(np.array([1.0, 2.0]), np.array([False, False]))
    assert not score.defined
    assert np.isnan(score.area)
