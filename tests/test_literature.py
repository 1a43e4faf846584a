"""The command that reproduces published results runs in a real process, cut down; its generators draw what they say."""

from __future__ import annotations

import gzip
import re
import shutil
import subprocess
import sys
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest

from benchmarks.literature import choosing, finite_sum, mixtures, regressions, small_data
from benchmarks.literature.__main__ import DOCS, GUIDE, ROWS, renew
from benchmarks.literature.experiment import Comparison, median_interval
from benchmarks.literature.r_draws import RStream

ROOT = Path(__file__).parent.parent


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "benchmarks.literature", *arguments], cwd=ROOT, capture_output=True, text=True
    )


def draw_faithful(folder: Path) -> None:
    """Two clusters under the names of Old Faithful's columns."""
    generator = np.random.default_rng(0)
    events = generator.normal((2.0, 55.0), (0.3, 6.0), (200, 2)) + np.where(np.arange(200) % 3, 1.0, 0.0)[:, None] * (
        2.3,
        25.0,
    )
    np.savetxt(folder / "faithful.csv", events, delimiter=",", header="eruptions,waiting", comments="")


@pytest.mark.slow
def test_rows_are_printed_and_written_and_those_without_data_are_not_run(tmp_path: Path) -> None:
    docs = tmp_path / "docs"
    docs.mkdir()
    for page in ("literature.md", "choosing.md"):
        shutil.copy(DOCS / page, docs / page)
    draw_faithful(tmp_path)
    before = (docs / "literature.md").read_text()
    done = command(
        *("--data", str(tmp_path), "--rows", "2,6,7,11,12,warm-up,elec2", "--write", str(docs)),
        *("--seeds", "1", "--scale", "0.005", "--processes", "1"),
    )
    assert done.returncode == 0, done.stderr
    assert "Row 7 was not run: mnist_t10k_images.idx3.gz is not in the folder" in done.stdout
    assert "Row elec2 was not run: elec2.csv is not in the folder" in done.stdout
    after = (docs / "literature.md").read_text()
    for row, title in (("2", "Row 2. Iris1"), ("6", "Row 6. Two Gaussians"), ("11", "Row 11."), ("12", "Row 12.")):
        (section,) = re.findall(rf"<!-- {row} -->\n(.*?)\n<!-- end -->", after, re.DOTALL)
        assert title in section
        assert section in done.stdout or "![" in section
        assert "Cut down: --seeds 1 --scale 0.005" in section
        picture = matplotlib.image.imread(docs / "literature" / f"row-{int(row):02}.png")
        assert picture.std() > 0.02
    # What was not asked for, or not run, stays.
    for row in ("1", "7", "8", "13"):
        pattern = rf"<!-- {row} -->\n.*?<!-- end -->"
        assert re.findall(pattern, after, re.DOTALL) == re.findall(pattern, before, re.DOTALL)
    assert "| `warm_up=200` |" in (docs / "choosing.md").read_text()
    # 64 shards, some of them empty, give what one does.
    assert after.count("at most 1e-10: met") == 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--rows", "2,13x"), "unknown rows: 13x; known are 1, 2"),
        (("--data", "no-such-folder"), "there is no folder no-such-folder"),
        (("--seeds", "0"), "--seeds must be at least 1"),
        (("--scale", "0"), "--scale must be above 0 and at most 1"),
    ],
)
def test_wrong_arguments_are_refused(arguments: tuple[str, ...], message: str) -> None:
    done = command(*arguments)
    assert done.returncode == 2
    assert message in done.stderr


def test_every_row_has_a_place_on_its_page() -> None:
    for rows, page in ((ROWS, "literature.md"), (GUIDE, "choosing.md")):
        text = (DOCS / page).read_text()
        for name in rows:
            assert text.count(f"<!-- {name} -->\n") == 1


def test_a_page_without_the_place_is_left_as_it_is(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- a -->\nold\n<!-- end -->\nafter\n")
    renew(page, "a", "new")
    assert page.read_text() == "before\n<!-- a -->\nnew\n<!-- end -->\nafter\n"
    with pytest.raises(SystemExit, match="has no place for row b"):
        renew(page, "b", "new")
    assert page.read_text() == "before\n<!-- a -->\nnew\n<!-- end -->\nafter\n"


def test_a_figure_is_met_by_its_median_within_the_tolerance() -> None:
    met = Comparison("a", 10.0, [9.0, 10.4, 30.0], 0.5, ".1f", [False, False, True]).cells()
    assert met == ("a", "10.0", "10.4", "9.0 to 30.0", "1 of 3", "±0.5: met")
    # With three runs the median may be anywhere among them; with ten that lie close together it is known.
    by_chance = Comparison("a", 10.0, [9.0, 10.6, 30.0], 0.5, ".1f").cells()[-1]
    assert by_chance == "±0.5: MISSED, by chance? Our median's 95% interval is 9.0 to 30.0"
    assert Comparison("a", 10.0, [8.0, *[10.6] * 8, 12.0], 0.5, ".1f").cells()[-1] == "±0.5: MISSED"


def test_the_interval_of_the_median_holds_it_in_95_of_100_samples() -> None:
    generator = np.random.default_rng(0)
    intervals = [median_interval(generator.normal(size=20).tolist()) for _ in range(2_000)]
    held = np.mean([low <= 0.0 <= high for low, high in intervals])
    assert 0.94 < held < 0.98


@pytest.mark.parametrize("row", mixtures.STUDIES)
def test_studies_draw_what_the_paper_says(row: int) -> None:
    study = mixtures.STUDIES[row]()
    batch, components = study.draw(40_000, seed=1)
    np.testing.assert_allclose(np.bincount(components) / 40_000, study.truth.weights, atol=0.01)
    mean, variance = study.model.bind(study.schema).family.moments(study.truth.components)
    for component in range(3):
        of_component = batch.values[:, components == component]
        error = np.sqrt(variance[component] / of_component.shape[1])
        assert (np.abs(of_component.mean(axis=1) - mean[component]) < 4.5 * error).all()


def test_the_draws_are_those_of_r() -> None:
    # Printed by R 4.2 after RNGkind(sample.kind = "Rounding"); set.seed(42).
    stream = RStream(42)
    np.testing.assert_allclose(stream.uniform(3), [0.9148060435, 0.9370754133, 0.2861395348], rtol=1e-9)
    np.testing.assert_allclose(stream.normal(2), [0.95593564863, 0.04788473609], rtol=1e-9)
    # And rbinom(4, 1000, c(0.03, 0.3, 0.97, 0.5)), sample(5, 6, replace = TRUE) after that.
    assert [stream.binomial(1000, chance) for chance in (0.03, 0.3, 0.97, 0.5)] == [28, 280, 968, 490]
    assert (stream.labels(6, 5) + 1).tolist() == [3, 5, 1, 5, 5, 1]
    with pytest.raises(ValueError, match="mean of at least 30 both ways"):
        stream.binomial(1000, 0.98)


def test_batch_em_ends_where_the_authors_runs_did() -> None:
    # Runs 1, 2 and 6 in the file of results beside the authors' script.
    study = mixtures.elki1()
    streams = list(study.streams(6, 1_000_000))
    for run, published in ((0, 352271.2), (1, 418455.9), (5, 134792.3)):
        fits = mixtures.fit_as_published(3, 1_000_000, 0, mixtures.N_ONLINE_SEEDS + run, streams[run])
        assert fits.log_likelihood == {mixtures.BATCH: pytest.approx(published, rel=1e-6)}


def test_the_second_regression_is_a_parabola() -> None:
    events = regressions.draw(20_000, seed=1)
    u, u2, y = events.T
    np.testing.assert_allclose(u2, u * u / 10.0)
    # Half of the events lie about 5 U and half about 15 + 10 U - U².
    design = np.stack([np.ones_like(u), u, u2], axis=1)
    np.testing.assert_allclose(np.linalg.lstsq(design, y)[0], [7.5, 7.5, -5.0], atol=1.5)
    truth = regressions.parameters(regressions.TRUE, regressions.TRUE_VARIANCE)
    np.testing.assert_allclose(truth.components.covariate_mean, events[:, :2].mean(axis=0), atol=0.1)
    np.testing.assert_allclose(truth.components.covariate_covariance, np.cov(events[:, :2].T), atol=0.3)


def test_images_are_projected_on_their_principal_directions(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, size=(300, 28 * 28), dtype=np.uint8)
    pixels[:, :300] = 7
    pixels[:, 500:] = pixels[:, 400:401]
    path = tmp_path / finite_sum.IMAGES
    path.write_bytes(gzip.compress(bytes(16) + pixels.tobytes()))
    images = finite_sum.read_images(path, 200)
    assert images.shape == (200, 20)
    np.testing.assert_allclose(images.mean(axis=0), 0.0, atol=1e-9)
    covariance = np.cov(images.T)
    np.testing.assert_allclose(covariance, np.diag(np.diagonal(covariance)), atol=1e-9 * covariance.max())
    # The pixels that are one and the same make up the first of all directions.
    assert covariance.max() > 100.0


def test_the_market_is_scored_before_it_is_learned() -> None:
    generator = np.random.default_rng(0)
    events = generator.normal(size=(60 * choosing.A_DAY, 2))
    events[40 * choosing.A_DAY :] += 50.0
    shifted = slice(40 * choosing.A_DAY, 41 * choosing.A_DAY)
    for found in (
        choosing.follow(events, {"window": 7 * choosing.A_DAY}, seed=0),
        choosing.refit(events, 7, 7, seed=0),
    ):
        assert found.log_prob.shape == (len(events),)
        # The day of the shift comes as a surprise, whatever is learned from it afterwards.
        assert found.log_prob[shifted].max() < -100.0
        assert found.log_prob[-choosing.A_DAY :].mean() > -6.0


def test_online_em_reaches_the_maximum_of_batch_em_in_many_passes() -> None:
    events = np.random.default_rng(0).normal(size=(90, 2)) + 6.0 * (np.arange(90) % 2)[:, None]
    batch, online = small_data.fit(small_data.Maximum("full", 2, 0.0), events, 300, seed=0)
    assert online.log_prob(events).sum() == pytest.approx(batch.log_prob(events).sum(), abs=0.01)
