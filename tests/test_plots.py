"""Pictures are drawn for real, read back from the file and looked at as arrays of pixels."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace

import matplotlib.image
import numpy as np
import pytest
from matplotlib.colors import to_rgba
from matplotlib.patches import Polygon

from stream_em import BatchEM, Bernoulli, Categorical, Gaussian, Mixture, OnlineEM, Product, plots
from stream_em.schema import Field, Schema


class Drawn:
    """What a learner shows of itself, with parameters of our choice."""

    n_events = 10_000
    warming_up = False

    def __init__(self, weights, mean, covariance, schema=None, ids=None):
        weights, self.mean = np.asarray(weights, dtype=float), np.asarray(mean, dtype=float)
        covariance = np.asarray(covariance, dtype=float)
        if covariance.ndim == 2:
            covariance = np.stack([np.diag(variances) for variances in covariance])
        self.covariance = covariance
        names = [f"f{column}" for column in range(self.mean.shape[1])]
        self.schema = schema or Schema([Field(name, "numeric") for name in names])
        ids = np.arange(len(weights)) if ids is None else np.asarray(ids)
        self.parameters = SimpleNamespace(weights=weights / weights.sum(), component_ids=ids)

    def marginals(self):
        return self.mean, np.sqrt(np.diagonal(self.covariance, axis1=1, axis2=2))

    def pair_covariance(self, i, j):
        return self.covariance[:, [[i], [j]], [i, j]]

    def describe(self):
        return [
            SimpleNamespace(
                id=int(one),
                fields=[SimpleNamespace(name=name, text=f"about {one}", effect=1.0) for name in self.schema.names],
            )
            for one in self.parameters.component_ids
        ]

    def encode(self, events):
        return self.schema.encode(events)

    def predict(self, batch):
        return np.full(batch.n_events, self.parameters.component_ids[0])


def random_drawn(n_components, n_fields=3, seed=0, **more):
    generator = np.random.default_rng(seed)
    root = generator.normal(size=(n_components, n_fields, n_fields))
    return Drawn(
        generator.dirichlet(np.full(n_components, 3.0)),
        5.0 * generator.normal(size=(n_components, n_fields)),
        root @ root.transpose(0, 2, 1) + 0.1 * np.eye(n_fields),
        **more,
    )


def a_history(learner, n_rows=30):
    generator = np.random.default_rng(1)
    weights = generator.dirichlet(1000.0 * learner.parameters.weights, size=n_rows)
    return [(100 * row + 100, -5.0 + generator.normal(), weights[row]) for row in range(n_rows)]


def pixels(path, figure):
    """Read a picture back; return it as (rows, columns, 3), and the part within each axes of the figure."""
    image = matplotlib.image.imread(path)[..., :3]
    assert image.shape == (round(figure.bbox.height), round(figure.bbox.width), 3)
    parts = []
    for axes in figure.axes:
        box = axes.get_window_extent()
        top, bottom = image.shape[0] - int(box.y1), image.shape[0] - int(box.y0)
        parts.append(image[top:bottom, int(box.x0) : int(box.x1)])
    return image, parts


def holds_color(part, color, blend=1.0):
    """Whether a visible number of pixels has this color, blended with white."""
    wanted = blend * np.array(to_rgba(color)[:3]) + 1.0 - blend
    return (np.abs(part - wanted).max(axis=2) < 0.02).sum() > 50


def written(axes):
    """All that is written within and around an axes."""
    texts = [text.get_text() for text in axes.texts]
    return "\n".join([*texts, axes.get_title(loc="left"), axes.get_xlabel(), axes.get_ylabel()])


def ids_on(axes):
    return [text.get_text() for text in axes.texts if text.get_text().isdigit()]


def outlines(axes):
    return [patch.get_xy()[:-1] for patch in axes.patches if isinstance(patch, Polygon)]


def test_a_run_fills_all_three_panels(tmp_path):
    learner = random_drawn(4)
    figure = plots.plot_run(learner, a_history(learner), tmp_path / "run.png")
    image, (components, weights, likelihood) = pixels(tmp_path / "run.png", figure)
    assert image.shape == (900, 1620, 3)
    for color in plots.PALETTE[:4]:
        assert holds_color(weights, color)
        assert holds_color(components, color, blend=0.95)
    assert holds_color(likelihood, plots.PALETTE[0])
    assert sorted(ids_on(figure.axes[0])) == ["0", "1", "2", "3"]


def test_a_learner_is_drawn_with_its_descriptions(tmp_path):
    learner = random_drawn(4, ids=[7, 3, 11, 2])
    figure = plots.plot_learner(learner, tmp_path / "learner.png")
    _, (_, descriptions) = pixels(tmp_path / "learner.png", figure)
    assert all(holds_color(descriptions, color) for color in plots.PALETTE[:4])
    shown = written(figure.axes[1])
    assert all(f"about {one}" in shown for one in (7, 3, 11, 2))


def test_the_heaviest_component_leads_every_panel(tmp_path):
    learner = Drawn([0.2, 0.7, 0.1], np.arange(6.0).reshape(3, 2), np.ones((3, 2)), ids=[5, 9, 4])
    history = [(100, -1.0, learner.parameters.weights), (200, -1.0, learner.parameters.weights)]
    figure = plots.plot_run(learner, history, tmp_path / "run.png")
    layers = figure.axes[1].collections
    heights = [np.ptp(layer.get_paths()[0].vertices[:, 1]) for layer in layers]
    assert heights == pytest.approx([0.7, 0.2, 0.1])
    entries = [text.get_text().split()[0] for text in figure.axes[1].get_legend().get_texts()]
    assert entries == ["4", "5", "9"]


@pytest.mark.parametrize(
    ("mean", "deviation", "first"),
    [
        ([[0, 0], [1, 9]], [[1, 1], [1, 1]], 1),  # further apart
        ([[0, 0], [9, 9]], [[1, 5], [1, 5]], 0),  # as far apart, but narrower
        ([[0, 0], [1e9, 3]], [[1e9, 1], [1e9, 1]], 1),  # a unit is no evidence
        ([[4, 0], [4, 1e-3]], [[0, 1], [0, 1]], 1),  # a constant tells nothing
        ([[0, 0], [np.nan, 1]], [[1, 1], [1, 1]], 1),  # nor does what is not known
        ([[0, 0], [1e200, 1]], [[1e200, 1e-3], [1e200, 1e-3]], 1),  # squares out of range
    ],
)
def test_telling_fields(mean, deviation, first):
    order = plots.telling_fields(np.array([0.5, 0.5]), np.array(mean, float), np.array(deviation, float))
    assert order[0] == first
    assert sorted(order) == [0, 1]


def test_a_light_component_far_out_does_not_choose_the_field():
    weights = np.array([0.5, 0.5 - 1e-6, 1e-6])
    mean = np.array([[0.0, 0.0], [0.0, 2.0], [1e9, 0.0]])
    assert plots.telling_fields(weights, mean, np.ones((3, 2)))[0] == 1


def test_axes_carry_the_two_most_telling_fields(tmp_path):
    mean = np.array([[0.0, 0.0, 0.0], [0.5, 20.0, 5.0]])
    figure = plots.plot_run(Drawn([0.5, 0.5], mean, np.ones((2, 3))), None, tmp_path / "run.png")
    assert (figure.axes[0].get_xlabel(), figure.axes[0].get_ylabel()) == ("f1", "f2")


def test_a_copy_of_the_first_field_is_not_the_second(tmp_path):
    mean = np.array([[0.0, 0.0, 0.0], [10.0, 20.0, 2.0]])
    covariance = np.array([[1.0, 2.0, 0.0], [2.0, 4.0 + 1e-9, 0.0], [0.0, 0.0, 1.0]])
    figure = plots.plot_run(Drawn([0.5, 0.5], mean, [covariance] * 2), None, tmp_path / "run.png")
    assert {figure.axes[0].get_xlabel(), figure.axes[0].get_ylabel()} in ({"f0", "f2"}, {"f1", "f2"})


@pytest.mark.parametrize("seed", range(5))
def test_an_ellipse_has_the_eigenvectors_as_axes(seed):
    root = np.random.default_rng(seed).normal(size=(2, 2))
    covariance, mean = root @ root.T, np.array([3.0, -1.0])
    offset = plots.ellipse(mean, covariance) - mean
    squared = np.einsum("ni,ij,nj->n", offset, np.linalg.inv(covariance), offset)
    np.testing.assert_allclose(squared, 4.0, rtol=1e-9)
    eigenvalues, eigenvectors = np.linalg.eigh(covariance)
    length = np.linalg.norm(offset, axis=1)
    np.testing.assert_allclose([length.min(), length.max()], 2.0 * np.sqrt(eigenvalues), rtol=1e-3)
    assert abs(offset[length.argmax()] @ eigenvectors[:, 1]) == pytest.approx(length.max(), rel=1e-3)


def test_ellipses_in_the_picture_are_those_of_the_learner(tmp_path):
    learner = random_drawn(3, seed=4)
    axes = plots.plot_run(learner, None, tmp_path / "run.png").axes[0]
    columns = [learner.schema.position(axes.get_xlabel()), learner.schema.position(axes.get_ylabel())]
    largest_first = np.argsort([-np.linalg.det(one[np.ix_(columns, columns)]) for one in learner.covariance])
    for rank, outline in zip(largest_first, outlines(axes), strict=True):
        np.testing.assert_allclose(outline[:-1].mean(axis=0), learner.mean[rank, columns], atol=1e-9)
        drawn = np.cov(outline[:-1].T, bias=True) / 2.0
        np.testing.assert_allclose(drawn, learner.covariance[rank][np.ix_(columns, columns)], rtol=1e-6)


def test_a_singular_covariance_is_a_line():
    outline = plots.ellipse(np.zeros(2), np.array([[1.0, 1.0], [1.0, 1.0 - 1e-12]]))
    assert np.isfinite(outline).all()
    np.testing.assert_allclose(outline[:, 0], outline[:, 1], atol=1e-5)


def test_a_light_component_far_out_is_counted_and_does_not_squash_the_rest(tmp_path):
    near = random_drawn(3)
    weights = np.append(near.parameters.weights, 1e-6)
    learner = Drawn(
        weights,
        np.vstack([near.mean, np.full(3, 1e6)]),
        np.concatenate([near.covariance, 1e8 * np.eye(3)[None]]),
        ids=[0, 1, 2, 77],
    )
    axes = plots.plot_run(learner, None, tmp_path / "far.png").axes[0]
    assert np.ptp(axes.get_xlim()) < 100.0
    assert np.ptp(axes.get_ylim()) < 100.0
    assert "1 component lies outside this view (< 0.0001 % of the weight): 77" in written(axes)
    assert sorted(ids_on(axes)) == ["0", "1", "2"]


def test_what_lies_within_the_view_is_not_reported_outside(tmp_path):
    axes = plots.plot_run(random_drawn(6), None, tmp_path / "run.png").axes[0]
    assert "outside" not in written(axes)


def test_a_wide_component_does_not_push_the_others_together(tmp_path):
    learner = Drawn([0.55, 0.4, 0.05], [[0, 0], [4, 4], [1, 1]], [[1, 1], [1, 1], [1e6, 1e6]])
    axes = plots.plot_run(learner, None, tmp_path / "wide.png").axes[0]
    assert np.ptp(axes.get_xlim()) < 50.0
    assert "wider than this view: component 2" in written(axes)


@pytest.mark.parametrize("weight", [0.5, 0.05, 0.011])
def test_a_component_that_carries_weight_is_always_in_view(weight):
    low, high = plots.view_limits(np.array([1 - weight, weight]), np.array([0.0, 1e4]), np.ones(2))
    assert low < 0.0
    assert high > 1e4


def test_limits_of_identical_constants_have_a_width():
    low, high = plots.view_limits(np.array([0.5, 0.5]), np.array([1e8, 1e8]), np.zeros(2))
    assert low < 1e8 < high


def test_heavy_tails_get_an_axis_on_which_every_component_is_seen(tmp_path):
    mean = np.array([[1.0, 1.0], [30.0, 2.0], [900.0, 3.0], [27000.0, 4.0]])
    learner = Drawn([0.4, 0.3, 0.2, 0.1], mean, np.column_stack([(0.3 * mean[:, 0]) ** 2, np.ones(4)]))
    axes = plots.plot_run(learner, None, tmp_path / "tails.png").axes[0]
    assert (axes.get_xscale(), axes.get_yscale()) == ("asinh", "linear")
    assert "asinh scale" in axes.get_xlabel()
    for outline in outlines(axes):
        ends = axes.transData.transform(outline)
        assert np.ptp(ends[:, 0]) > 10.0


def test_an_offset_is_written_out_in_the_ticks(tmp_path):
    learner = random_drawn(3)
    learner.mean = learner.mean + 1e8
    figure = plots.plot_run(learner, None, tmp_path / "offset.png")
    labels = {label.get_text() for label in figure.axes[0].get_xticklabels()}
    assert all(label.startswith(("100,000,0", "99,999,9")) for label in labels)
    assert len(labels) > 2


def test_thirty_components_keep_their_ids_apart(tmp_path):
    learner = random_drawn(30, n_fields=4, seed=3)
    figure = plots.plot_run(learner, a_history(learner), tmp_path / "thirty.png")
    axes = figure.axes[0]
    labels = [text for text in axes.texts if text.get_text().isdigit()]
    assert sorted(int(text.get_text()) for text in labels) == list(range(30))
    boxes = [text.get_window_extent() for text in labels]
    assert not any(one.overlaps(other) for i, one in enumerate(boxes) for other in boxes[:i])
    entries = [text.get_text() for text in figure.axes[1].get_legend().get_texts()]
    assert len(entries) == len(plots.PALETTE) + 1
    assert entries[0].startswith("21 more")
    plots.plot_learner(learner, tmp_path / "learner.png")


def test_more_components_than_can_be_listed_are_counted(tmp_path):
    learner = random_drawn(40, n_fields=2, seed=3)
    figure = plots.plot_learner(learner, tmp_path / "forty.png")
    assert "and 10 lighter components" in written(figure.axes[1])
    assert "only the ids of the 30 heaviest" in written(figure.axes[0])


def test_one_component(tmp_path):
    learner = random_drawn(1)
    figure = plots.plot_run(learner, a_history(learner), tmp_path / "one.png")
    assert ids_on(figure.axes[0]) == ["0"]
    assert "1 component learned from" in figure.get_suptitle()


def test_components_that_came_and_went(tmp_path):
    learner = Drawn([0.2, 0.8], np.arange(4.0).reshape(2, 2), np.ones((2, 2)), ids=[5, 9])
    history = [(100, -2.0, {3: 0.4, 9: 0.6}), (200, -1.0, {5: 0.2, 9: 0.8})]
    figure = plots.plot_run(learner, history, tmp_path / "run.png")
    tops = [layer.get_paths()[0].vertices[:, 1].max() for layer in figure.axes[1].collections]
    assert tops == pytest.approx([0.8, 1.0, 1.0])
    entries = [text.get_text().split()[0] for text in figure.axes[1].get_legend().get_texts()]
    assert entries == ["gone", "5", "9"]
    assert holds_color(pixels(tmp_path / "run.png", figure)[1][1], plots.GONE)


@pytest.mark.parametrize("history", [None, []])
def test_nothing_recorded(tmp_path, history):
    figure = plots.plot_run(random_drawn(2), history, tmp_path / "run.png")
    assert all("nothing recorded" in written(axes) for axes in figure.axes[1:])


def test_values_that_are_not_finite_are_counted_and_left_out(tmp_path):
    learner = random_drawn(2)
    history = a_history(learner)
    history[3] = (400, np.nan, history[3][2])
    history[4] = (500, -np.inf, np.array([np.nan, 0.5]))
    figure = plots.plot_run(learner, history, tmp_path / "run.png")
    assert "1 row not finite, left out" in written(figure.axes[1])
    assert "2 rows not finite, left out" in written(figure.axes[2])
    assert np.isfinite(figure.axes[2].get_ylim()).all()


def test_weights_unknown_at_first(tmp_path):
    learner = random_drawn(2)
    history = [(100, -3.0, None), *a_history(learner)[1:]]
    figure = plots.plot_run(learner, history, tmp_path / "run.png")
    assert "known from 200 events on" in written(figure.axes[1])
    assert "not finite" not in written(figure.axes[1])


def test_weights_of_another_model_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"weights of shape \(3,\), expected \(2,\)"):
        plots.plot_run(random_drawn(2), [(100, -1.0, np.ones(3) / 3)], tmp_path / "run.png")


def test_one_collapse_of_the_likelihood_does_not_flatten_the_rest(tmp_path):
    learner = random_drawn(2)
    history = a_history(learner, n_rows=60)
    history[20] = (2100, -1e9, history[20][2])
    axes = plots.plot_run(learner, history, tmp_path / "run.png").axes[2]
    assert np.ptp(axes.get_ylim()) < 20.0
    assert "1 below this view, the furthest -1e+09" in written(axes)


def test_a_steady_climb_is_shown_whole(tmp_path):
    learner = random_drawn(2)
    history = [(row, -100.0 / row, None) for row in range(1, 9)]
    axes = plots.plot_run(learner, history, tmp_path / "run.png").axes[2]
    assert axes.get_ylim()[0] < -100.0
    assert "below" not in written(axes)


def test_long_and_odd_names_are_shortened_and_taken_literally(tmp_path):
    names = ["energy of the $x_1$ " + "very " * 60 + "last", "a\nb"]
    schema = Schema([Field(name, "numeric") for name in names])
    learner = random_drawn(2, n_fields=2, schema=schema)
    figure = plots.plot_run(learner, None, tmp_path / "names.png")
    labels = {figure.axes[0].get_xlabel(), figure.axes[0].get_ylabel()}
    assert "a b" in labels
    (long,) = labels - {"a b"}
    assert long.startswith("energy of the $x_1$")
    assert long.endswith("last")
    assert len(long) <= 44
    _, (components, *_) = pixels(tmp_path / "names.png", figure)
    assert components.shape[1] > 600
    plots.plot_learner(learner, tmp_path / "learner.png")


def test_one_measured_field_is_drawn_as_intervals(tmp_path):
    schema = Schema({"load": "numeric", "host": "category"})
    learner = Drawn([0.6, 0.4], [[0, 1], [8, 2]], np.ones((2, 2)), schema)
    figure = plots.plot_run(learner, a_history(learner), tmp_path / "one.png")
    axes = figure.axes[0]
    assert axes.get_xlabel() == "load"
    assert [label.get_text() for label in axes.get_yticklabels()] == ["0  (60.0 %)", "1  (40.0 %)"]
    _, (components, *_) = pixels(tmp_path / "one.png", figure)
    assert all(holds_color(components, color) for color in plots.PALETTE[:2])


def test_events_are_drawn_in_the_color_of_their_component(tmp_path):
    learner = random_drawn(2, n_fields=2)
    values = np.random.default_rng(0).normal(size=(plots.N_SCATTERED + 1, 2))
    events = [{"f0": x, "f1": y} for x, y in values]
    axes = plots.plot_learner(learner, tmp_path / "events.png", events).axes[0]
    (cloud,) = axes.collections
    assert len(cloud.get_offsets()) == len(events) // 2 + 1
    rank = np.argsort(-learner.parameters.weights).tolist().index(0)
    np.testing.assert_allclose(cloud.get_facecolors()[0, :3], to_rgba(plots.PALETTE[rank])[:3])


def test_events_that_are_not_seen_are_counted(tmp_path):
    learner = Drawn([1.0], [[0.0, 0.0]], np.ones((1, 2)))
    events = [{"f0": 0.1, "f1": 0.2}] * 97 + [{"f0": 1e6, "f1": 0.0}, {"f0": 1.0}, {"f1": 1.0}]
    axes = plots.plot_learner(learner, tmp_path / "events.png", events).axes[0]
    assert np.ptp(axes.get_xlim()) < 10.0
    assert "events outside this view or without a value for it: 3 of 100 drawn" in written(axes)


def test_the_view_is_widened_for_events_near_it(tmp_path):
    learner = Drawn([1.0], [[0.0, 0.0]], np.ones((1, 2)))
    axes = plots.plot_learner(learner, tmp_path / "events.png", [{"f0": 3.0, "f1": -3.0}] * 10).axes[0]
    assert axes.get_xlim()[1] > 3.0
    assert axes.get_ylim()[0] < -3.0
    assert "events outside" not in written(axes)


def categorical_events(n_events=600):
    generator = np.random.default_rng(0)
    group = generator.integers(2, size=n_events)
    countries = np.array([["DE", "FR", "IT"], ["US", "CA", "MX"]])[group, generator.integers(3, size=n_events)]
    phone = generator.random(n_events) < np.array([0.1, 0.9])[group]
    noise = generator.choice(["a", "b"], size=n_events)
    return [{"noise": str(n), "country": str(c), "phone": bool(p)} for n, c, p in zip(noise, countries, phone)]


def test_categories_are_drawn_as_shares(tmp_path):
    family = Product({"country": Categorical(), "phone": Bernoulli(), "noise": Categorical()})
    learner = OnlineEM(Mixture(family, 2), seed=0).update(categorical_events())
    figure = plots.plot_run(learner, [], tmp_path / "shares.png")
    axes = figure.axes[0]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["phone", "country"]
    bars = [(round(bar.get_y() + 0.35), bar.get_width()) for bar in axes.patches]
    for rank in range(2):
        assert sum(width for row, width in bars if row == rank) == pytest.approx(2.0)
    assert {"DE", "US", "true", "false"} <= {text.get_text() for text in axes.texts}
    _, (shares, *_) = pixels(tmp_path / "shares.png", figure)
    assert all(holds_color(shares, color, blend=0.9) for color in plots.PALETTE[:2])


def test_many_categories_are_joined(tmp_path):
    schema = Schema([Field("letter", "category", tuple("abcdefghijklmnop"))])
    events = [{"letter": letter} for letter in "abcdefghijklmnop" * 30 + "a" * 500]
    learner = OnlineEM(Mixture(Categorical(), 2), schema=schema, seed=0).update(events)
    axes = plots.plot_run(learner, None, tmp_path / "letters.png").axes[0]
    assert len(axes.patches) == 2 * (plots.N_CATEGORIES + 1)
    assert "11 more" in {text.get_text() for text in axes.texts}


def test_iris(tmp_path):
    events = pytest.importorskip("sklearn.datasets").load_iris(as_frame=True).data
    learner = BatchEM(Mixture(Gaussian(), 3), seed=0, n_init=3).fit(events)
    figure = plots.plot_learner(learner, tmp_path / "iris.png", events)
    axes = figure.axes[0]
    assert {axes.get_xlabel(), axes.get_ylabel()} == {"petal length (cm)", "petal width (cm)"}
    _, (components, _) = pixels(tmp_path / "iris.png", figure)
    assert all(holds_color(components, color, blend=0.95) for color in plots.PALETTE[:3])


def test_a_stream_from_start_to_end(tmp_path):
    shuttle = pytest.importorskip("river.datasets").Shuttle()
    events = [event for event, _ in shuttle.take(20_000)]
    learner = OnlineEM(Mixture(Gaussian(), 8), seed=0)
    history = []
    for start in range(0, len(events), 1000):
        warming_up = learner.warming_up
        log_prob = learner.predict_then_update(events[start : start + 1000]).log_prob
        weights = None if warming_up else learner.parameters.weights
        history.append((learner.n_events, float(log_prob.mean()), weights))
    figure = plots.plot_run(learner, history, tmp_path / "run.png")
    assert "8 components learned from 20,000 events" in figure.get_suptitle()
    assert len(ids_on(figure.axes[0])) >= 6
    _, parts = pixels(tmp_path / "run.png", figure)
    assert all(np.unique(part.reshape(-1, 3), axis=0).shape[0] > 20 for part in parts)


def test_a_learner_that_is_warming_up_says_so(tmp_path):
    learner = OnlineEM(Mixture(Gaussian(), 3)).update([{"x": 1.0, "y": 2.0}, {"x": 2.0, "y": 0.0}])
    figure = plots.plot_run(learner, None, tmp_path / "run.png")
    assert "still warming up" in figure.get_suptitle()


def test_a_learner_without_events_is_refused(tmp_path):
    learner = OnlineEM(Mixture(Gaussian(), 2))
    with pytest.raises(ValueError, match="seen no events"):
        plots.plot_run(learner, None, tmp_path / "run.png")
    assert not (tmp_path / "run.png").exists()


def test_the_suffix_names_the_format(tmp_path):
    plots.plot_learner(random_drawn(2), tmp_path / "learner.svg")
    assert (tmp_path / "learner.svg").read_text().startswith("<?xml")


def test_matplotlib_is_imported_only_to_draw_and_pyplot_never():
    program = "import sys, stream_em.plots; sys.exit(any(name.startswith('matplotlib') for name in sys.modules))"
    subprocess.run([sys.executable, "-c", program], check=True)
    program = (
        "import sys, pathlib, tempfile; sys.path.insert(0, 'tests'); import test_plots as t; "
        "t.plots.plot_learner(t.random_drawn(2), pathlib.Path(tempfile.mkdtemp()) / 'p.png'); "
        "sys.exit('matplotlib.pyplot' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
