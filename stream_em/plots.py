"""What a person looks at: components over the two most telling fields, and a run over time, as one picture.

Matplotlib is imported when a picture is drawn, and only through its object-oriented interface: no window is
opened and nothing of a program's own figures is touched.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from stream_em.numerics import Array

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

    from stream_em.learners import BatchEM, OnlineEM

History = Sequence[tuple[int, float, npt.ArrayLike | Mapping[int, float] | None]]
Limits = tuple[float, float]

# Kinds of fields whose values lie on an axis with a unit; the code of a category or flag does not.
MEASURED = ("numeric", "count", "duration")

# Paul Tol's "muted" scheme, distinct under every common colour blindness; ordered so that the heaviest
# components, which come first, contrast most.
PALETTE = ("#332288", "#CC6677", "#44AA99", "#DDCC77", "#88CCEE", "#882255", "#999933", "#117733", "#AA4499")
OTHERS, GONE = "#B4B4B4", "#E8E8E8"
INK = "#222222"
QUIET = "#6A6A6A"

N_STANDARD_DEVIATIONS = 2.0
N_LISTED = 30
N_SCATTERED = 4000
N_STACKED = 300
N_CATEGORIES = 6

# Two fields this correlated over all events are one field twice; a picture of them is a line.
COPY_CORRELATION = 0.995

# Components of at least this weight are always in view; a lighter one is if it lies near the others.
ALWAYS_IN_VIEW = 0.01


def plot_run(learner: OnlineEM | BatchEM, history: History | None, path: str | PathLike[str]) -> Figure:
    """Draw a learner and how it got there: components, weights over time, log-likelihood over time.

    Components are ellipses of two standard deviations over the two most telling fields: those with the
    largest variance between components relative to the variance within them, components counting by weight.
    The darker an ellipse, the heavier its component. With one measured field components are intervals, with
    none they are bars of the shares that categories have in them.

    Parameters
    ----------
    learner
        A learner that has seen events.
    history
        Rows of (events seen, mean log-likelihood per event in nats, weights (K,), or by component id where
        components come and go, or None where they were not known), in order; None or empty when nothing was
        recorded. Rows that are not finite are left out of the picture, which says how many.
    path
        Where the picture is written; the suffix names the format (.png, .svg, .pdf).

    Returns
    -------
    figure
        The figure, for a notebook or for further drawing.

    Raises
    ------
    ValueError
        When the learner has seen no events, so that there is nothing to draw, or when weights in the history
        are not one a component.
    ImportError
        When Matplotlib is not installed.

    """
    parts = _Components.of(learner)
    figure = _new_figure(13.5, 7.5)
    grid = figure.add_gridspec(2, 2, width_ratios=(1.12, 1.0))
    _draw_components(figure.add_subplot(grid[:, 0]), parts, learner)
    over_time = figure.add_subplot(grid[0, 1])
    _draw_weights_over_time(over_time, parts, history or ())
    _draw_log_likelihood(figure.add_subplot(grid[1, 1]), history or ())
    _title(figure, parts, learner)
    figure.savefig(path)
    return figure


def plot_learner(learner: OnlineEM | BatchEM, path: str | PathLike[str], events: Any = None) -> Figure:
    """Draw the components of a learner over the two most telling fields, and list what sets each apart.

    Parameters
    ----------
    learner
        A learner that has seen events.
    path
        Where the picture is written; the suffix names the format (.png, .svg, .pdf).
    events
        Events in any form the learner takes, drawn beneath the components in the colour of the component that
        claims them; a regular sample of 4,000 when there are more.

    Returns
    -------
    figure
        The figure, for a notebook or for further drawing.

    Raises
    ------
    ValueError
        When the learner has seen no events, so that there is nothing to draw.
    EventError
        When one of the events cannot be used.
    ImportError
        When Matplotlib is not installed.

    """
    parts = _Components.of(learner)
    figure = _new_figure(13.5, 7.0)
    grid = figure.add_gridspec(1, 2, width_ratios=(1.25, 1.0))
    _draw_components(figure.add_subplot(grid[0, 0]), parts, learner, events)
    _draw_descriptions(figure.add_subplot(grid[0, 1]), parts, learner)
    _title(figure, parts, learner)
    figure.savefig(path)
    return figure


def telling_fields(weights: Array, mean: Array, standard_deviation: Array) -> npt.NDArray[np.intp]:
    """Return the positions of the fields, the one that sets the components apart most first.

    The measure is the variance between components relative to the variance between and within, averaged over
    all pairs of components, each counting by the product of their weights. Taking pairs bounds what one
    component far out can add: however far it is, it counts no more than its weight.

    Parameters
    ----------
    weights
        (K,) weights of the components.
    mean, standard_deviation
        (K, D) per component and field. A field that is not finite in a component says nothing about it.

    >>> weights = np.array([0.5, 0.5])
    >>> telling_fields(weights, np.array([[0.0, 0.0], [1.0, 9.0]]), np.ones((2, 2)))
    array([1, 0])

    """
    separation = np.zeros(mean.shape[1])
    for column in range(len(separation)):
        known = np.isfinite(mean[:, column]) & np.isfinite(standard_deviation[:, column])
        if not known.any():
            continue
        center, deviation, weight = mean[known, column], standard_deviation[known, column], weights[known]
        # In units of the spread the squares below cannot overflow.
        unit = max(float(np.ptp(center)), float(deviation.max()))
        if unit > 0.0:
            between = ((center[:, None] - center) / unit) ** 2
            total = between + (deviation[:, None] / unit) ** 2 + (deviation / unit) ** 2
            ratio = np.divide(between, total, out=np.zeros_like(total), where=total > 0.0)
            separation[column] = weight @ ratio @ weight
    return np.argsort(-separation, kind="stable")


def ellipse(mean: Array, covariance: Array, n_standard_deviations: float = N_STANDARD_DEVIATIONS) -> Array:
    """Return the outline (181, 2) of a Gaussian at so many standard deviations.

    Parameters
    ----------
    mean
        (2,) center.
    covariance
        (2, 2) covariance; the half axes are its eigenvectors, as long as the roots of its eigenvalues.

    >>> outline = ellipse(np.array([1.0, 0.0]), np.diag([4.0, 1.0]))
    >>> outline.max(axis=0).round(6).tolist(), outline.min(axis=0).round(6).tolist()
    ([5.0, 2.0], [-3.0, -2.0])

    """
    eigenvalues, eigenvectors = np.linalg.eigh(covariance)
    half_axes = n_standard_deviations * np.sqrt(np.maximum(eigenvalues, 0.0)) * eigenvectors
    angle = np.linspace(0.0, 2.0 * np.pi, 181)
    return np.asarray(mean + np.column_stack([np.cos(angle), np.sin(angle)]) @ half_axes.T)


def view_limits(weights: Array, mean: Array, standard_deviation: Array) -> Limits:
    """Return the limits of an axis that shows the components which carry the weight.

    The heaviest components that hold 95 % of the weight, and all of weight 1 % or more, are in view whatever
    it takes. A lighter one is if it lies no further out than the view is wide. A component wider than the
    bulk of the mixture is shown by its center and half as far again to each side as the bulk is wide.

    Parameters
    ----------
    weights, mean, standard_deviation
        (K,) each, finite.

    >>> view_limits(np.array([1 - 1e-6, 1e-6]), np.array([0.0, 1e6]), np.ones(2))
    (-2.5, 2.5)

    """
    order = np.argsort(-weights, kind="stable")
    weights, mean, deviation = weights[order], mean[order], standard_deviation[order]
    # The bulk of the mixture: from the 5 % to the 95 % quantile of the components' own quantiles.
    quantile = mean[:, None] + deviation[:, None] * np.linspace(-2.0, 2.0, 33)
    share = weights[:, None] * np.exp(-0.5 * np.linspace(-2.0, 2.0, 33) ** 2)
    flat = np.argsort(quantile, axis=None)
    reached = np.cumsum(share.ravel()[flat])
    low, high = quantile.ravel()[flat][np.searchsorted(reached, np.array([0.05, 0.95]) * reached[-1])]
    half_width = 2.5 * deviation
    # A component wider than the bulk must not push the others together.
    half_width = np.minimum(half_width, max(1.5 * (high - low), 2.5 * float(deviation[0])))
    heavier = np.cumsum(weights) - weights
    core = (heavier < 0.95 * weights.sum()) | (weights >= ALWAYS_IN_VIEW * weights.sum())
    start, stop = float((mean - half_width)[core].min()), float((mean + half_width)[core].max())
    span = stop - start
    near = (mean >= start - span) & (mean <= stop + span)
    start, stop = float((mean - half_width)[near].min()), float((mean + half_width)[near].max())
    if stop - start <= 1e-12 * max(abs(start), abs(stop)):
        pad = max(abs(start), abs(stop)) * 1e-3 or 1.0
        return start - pad, stop + pad
    return start, stop


@dataclass(frozen=True)
class _Components:
    """What is drawn of a learner, the heaviest component first."""

    ids: list[int]
    weights: Array
    names: list[str]
    kinds: list[str]
    mean: Array
    deviation: Array
    order: npt.NDArray[np.intp]

    @classmethod
    def of(cls, learner: OnlineEM | BatchEM) -> _Components:
        schema = learner.schema
        if schema is None or not learner.n_events:
            raise ValueError("nothing to draw: the learner has seen no events yet; update or fit it first")
        mean, deviation = learner.marginals()
        weights = np.asarray(learner.parameters.weights, dtype=np.float64)
        order = np.argsort(-weights, kind="stable")
        return cls(
            ids=[int(one) for one in np.asarray(learner.parameters.component_ids)[order]],
            weights=weights[order],
            names=[_shortened(one.name) for one in schema.fields],
            kinds=[one.kind for one in schema.fields],
            mean=np.asarray(mean)[order],
            deviation=np.asarray(deviation)[order],
            order=order,
        )

    def color(self, rank: int) -> str:
        return PALETTE[rank] if rank < self.n_colored else OTHERS

    @property
    def n_colored(self) -> int:
        return min(len(PALETTE), len(self.ids))

    def by_rank(self, weights: npt.ArrayLike | Mapping[int, float]) -> Array:
        """Return weights of an earlier time, the heaviest component of today first; those of others summed, last."""
        if isinstance(weights, Mapping):
            found = [weights.get(identity, 0.0) for identity in self.ids]
            gone = sum(weight for identity, weight in weights.items() if identity not in self.ids)
            return np.array([*found, gone])
        given = np.asarray(weights, dtype=np.float64)
        if given.shape != self.weights.shape:
            raise ValueError(f"history: weights of shape {given.shape}, expected {self.weights.shape}: one a component")
        return np.append(given[self.order], 0.0)

    def percent(self, rank: int) -> str:
        return _percent(float(self.weights[rank]))


def _new_figure(width: float, height: float) -> Figure:
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.layout_engine import ConstrainedLayoutEngine
    except ImportError as error:
        raise ImportError("pictures need Matplotlib: pip install 'stream-em[plots]'") from error
    layout = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.1, wspace=0.03, hspace=0.04)
    figure = Figure(figsize=(width, height), dpi=120, layout=layout, facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def _title(figure: Figure, parts: _Components, learner: OnlineEM | BatchEM) -> None:
    count = len(parts.ids)
    text = f"{count} component{'s' * (count != 1)} learned from {learner.n_events:,.0f} events"
    if getattr(learner, "warming_up", False):
        text += " (still warming up: nothing is learned yet)"
    figure.suptitle(text, x=0.012, ha="left", fontsize=15, fontweight="bold", color=INK)


def _draw_components(axes: Axes, parts: _Components, learner: OnlineEM | BatchEM, events: Any = None) -> None:
    usable = [
        column
        for column, kind in enumerate(parts.kinds)
        if kind in MEASURED and math.isfinite(parts.mean[:, column].sum() + parts.deviation[:, column].sum())
    ]
    ranked = telling_fields(parts.weights, parts.mean[:, usable], parts.deviation[:, usable])
    chosen = [usable[position] for position in ranked]
    if len(chosen) >= 2:
        _draw_ellipses(axes, parts, learner, chosen, events)
    elif len(chosen) == 1:
        _draw_intervals(axes, parts, chosen[0])
    else:
        _draw_shares(axes, parts, learner)


def _second_field(parts: _Components, learner: OnlineEM | BatchEM, chosen: Sequence[int]) -> tuple[int, Array]:
    """Return the most telling field that is no copy of the first, and the covariances of both."""
    first = chosen[0]
    fallback: tuple[int, Array] | None = None
    for second in chosen[1:]:
        covariance = np.asarray(learner.pair_covariance(first, second))[parts.order]
        if fallback is None:
            fallback = second, covariance
        offset = parts.mean[:, [first, second]] - parts.weights @ parts.mean[:, [first, second]]
        total = np.einsum("k,kij->ij", parts.weights, covariance + offset[:, :, None] * offset[:, None, :])
        first_deviation, second_deviation = np.sqrt(np.diagonal(total))
        if abs(total[0, 1]) < COPY_CORRELATION * first_deviation * second_deviation:
            return second, covariance
    assert fallback is not None
    return fallback


def _draw_ellipses(
    axes: Axes, parts: _Components, learner: OnlineEM | BatchEM, chosen: Sequence[int], events: Any
) -> None:
    from matplotlib.colors import to_rgba
    from matplotlib.patches import Polygon

    second, covariance = _second_field(parts, learner, chosen)
    columns = [chosen[0], second]
    center = parts.mean[:, columns]
    _set_axis(axes, "x", parts, columns[0])
    _set_axis(axes, "y", parts, columns[1])
    notes = _view_notes(axes, parts, columns)
    if events is not None:
        notes += _scatter(axes, parts, learner, columns, events)
    shares = np.sqrt(parts.weights / parts.weights[0]).tolist()
    # Large ones below, and those without a color of their own below all others: so nothing is hidden.
    spans = np.ptp([axes.get_xlim(), axes.get_ylim()], axis=1)
    area = np.linalg.det(covariance / np.outer(spans, spans))
    upward = np.lexsort((-area, np.arange(len(area)) < parts.n_colored))
    for depth, rank in enumerate(upward.tolist()):
        color, share = parts.color(rank), shares[rank]
        axes.add_patch(
            Polygon(
                ellipse(center[rank], covariance[rank]),
                facecolor=to_rgba(color, 0.04 + 0.4 * share),
                edgecolor=to_rgba(color, 0.95),
                linewidth=0.9 + 1.1 * share,
                zorder=3 + depth / len(shares),
            )
        )
    axes.plot(*center.T, linestyle="", marker="o", markersize=3.2, color=INK, zorder=5)
    _label_components(axes, parts, center)
    which = "two fields" if len(parts.ids) == 1 else "the two most telling fields"
    _dress(axes, f"Components ({N_STANDARD_DEVIATIONS:g} standard deviations) over {which}", notes)
    axes.grid(color="#E6E6E6", linewidth=0.7)


def _set_axis(axes: Axes, which: Literal["x", "y"], parts: _Components, column: int) -> None:
    from matplotlib.ticker import FixedLocator, MaxNLocator, NullLocator

    mean, deviation = parts.mean[:, column], parts.deviation[:, column]
    limits = view_limits(parts.weights, mean, deviation)
    label = parts.names[column]
    axis: Axis = getattr(axes, f"{which}axis")
    width = _asinh_width(parts.weights, mean, deviation, limits)
    if width is not None:
        getattr(axes, f"set_{which}scale")("asinh", linear_width=width)
        ends = np.arcsinh(np.stack([mean - deviation, mean, mean + deviation]) / width)
        low, high = view_limits(parts.weights, ends[1], (ends[2] - ends[0]) / 2.0)
        limits = width * float(np.sinh(low)), width * float(np.sinh(high))
        axis.set_major_locator(FixedLocator(_asinh_ticks(limits, width)))
        axis.set_minor_locator(NullLocator())
        label += "   (asinh scale)"
    else:
        axis.set_major_locator(MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]))
    # Neither an offset nor a power of ten beside the axis: every tick says its value.
    digits = max(6, 3 + math.ceil(math.log10(max(map(abs, limits)) / (limits[1] - limits[0]))))
    axis.set_major_formatter(lambda value, _: f"{value:,.{digits}g}".replace("-", "−"))
    getattr(axes, f"set_{which}lim")(limits)
    getattr(axes, f"set_{which}label")(label, parse_math=False, fontsize=11, color=INK)


def _asinh_width(weights: Array, mean: Array, deviation: Array, limits: Limits) -> float | None:
    """Where an asinh axis stops being linear, or None when the components are easy to see on a linear one."""
    span = limits[1] - limits[0]
    linear = _typical_size(weights, 2.0 * N_STANDARD_DEVIATIONS * deviation / span)
    best, best_size = None, 2.0 * linear
    # An axis on which most are as wide as this needs no bending, however much wider bending would make them.
    if linear < 0.04:
        for width in span * 10.0 ** np.arange(-1.0, -6.0, -0.5):
            start, stop = np.arcsinh(np.array(limits) / width)
            reach = N_STANDARD_DEVIATIONS * deviation
            size = np.arcsinh((mean + reach) / width) - np.arcsinh((mean - reach) / width)
            typical = _typical_size(weights, size / (stop - start))
            if typical > best_size:
                best, best_size = float(width), typical
    return best


def _typical_size(weights: Array, size: Array) -> float:
    """Geometric mean by weight of sizes that are shares of an axis; below a thousandth none is seen."""
    return float(np.exp(weights @ np.log(np.clip(size, 1e-3, 1.0)) / weights.sum()))


def _asinh_ticks(limits: Limits, width: float) -> list[float]:
    """Zero, and powers of ten beyond the linear part: not more than fit on the axis."""
    first = math.ceil(math.log10(3.0 * width))
    last = math.floor(math.log10(max(abs(limits[0]), abs(limits[1]), width)))
    step = max(1, (last - first) // 4)
    powers = [10.0**exponent for exponent in range(first, last + 1, step)]
    ticks = [-power for power in reversed(powers)] + [0.0, *powers]
    return [tick for tick in ticks if limits[0] <= tick <= limits[1]]


def _scatter(
    axes: Axes, parts: _Components, learner: OnlineEM | BatchEM, columns: Sequence[int], events: Any
) -> list[str]:
    """Draw a regular sample of the events, widen the view a little for it, and tell how many are not seen."""
    batch = learner.encode(events)
    batch = batch.select(slice(None, None, max(1, -(-batch.n_events // N_SCATTERED))))
    color_of = {one: parts.color(rank) for rank, one in enumerate(parts.ids)}
    x, y = batch.values[columns[0]], batch.values[columns[1]]
    axes.scatter(
        x,
        y,
        s=7,
        c=[color_of[one] for one in learner.predict(batch).tolist()],
        alpha=0.55,
        linewidths=0,
        zorder=2,
    )
    axes.set_xlim(_widened(axes.get_xlim(), x))
    axes.set_ylim(_widened(axes.get_ylim(), y))
    low, high = np.array([axes.get_xlim(), axes.get_ylim()]).T[:, :, None]
    values = np.stack([x, y])
    n_unseen = int((~((values >= low) & (values <= high)).all(axis=0)).sum())
    if not n_unseen:
        return []
    return [f"events outside this view or without a value for it: {n_unseen:,} of {batch.n_events:,} drawn"]


def _widened(limits: Limits, values: Array) -> Limits:
    """Limits that hold nearly all the values too, as far as that costs the components a third of the view."""
    known = values[~np.isnan(values)]
    if not len(known):
        return limits
    low, high = np.quantile(known, [0.002, 0.998])
    span = limits[1] - limits[0]
    return (
        max(min(limits[0], float(low) - 0.02 * span), limits[0] - 0.25 * span),
        min(max(limits[1], float(high) + 0.02 * span), limits[1] + 0.25 * span),
    )


def _label_components(axes: Axes, parts: _Components, center: Array) -> None:
    """Write each id near its center, moved aside where it would cover another one."""
    from matplotlib.patheffects import withStroke

    # Fractions of the axes: independent of the layout, which is only settled when the figure is drawn.
    spots = (axes.transScale + axes.transLimits).transform(center)
    inside = np.flatnonzero(((spots >= 0.0) & (spots <= 1.0)).all(axis=1))
    angles = np.deg2rad([90, 0, 270, 180, 45, 315, 225, 135])
    directions = np.column_stack([np.cos(angles), np.sin(angles)])
    moves = np.concatenate([reach * directions for reach in (0.024, 0.045, 0.07, 0.1)])
    # Rectangles to keep clear, as centers and half sizes: first the dots, then the ids written so far.
    taken, halves = spots[inside], np.full((len(inside), 2), 0.006)
    for rank in inside[:N_LISTED].tolist():
        text = str(parts.ids[rank])
        half = np.array([0.005 + 0.0065 * len(text), 0.013])
        places = np.clip(spots[rank] + moves, 0.02, 0.98)
        overlap = np.maximum(half + halves - np.abs(places[:, None] - taken), 0.0).prod(axis=2).sum(axis=1)
        best = int(np.argmin(overlap.round(7)))
        taken, halves = np.vstack([taken, places[best]]), np.vstack([halves, half])
        if best >= len(directions):
            axes.plot(
                *zip(spots[rank], places[best]),
                color=QUIET,
                linewidth=0.6,
                zorder=5,
                transform=axes.transAxes,
            )
        axes.text(
            float(places[best, 0]),
            float(places[best, 1]),
            text,
            transform=axes.transAxes,
            ha="center",
            va="center",
            fontsize=10,
            fontweight="bold",
            color=INK,
            zorder=6,
            path_effects=[withStroke(linewidth=2.6, foreground="white")],
        )


def _view_notes(axes: Axes, parts: _Components, columns: Sequence[int]) -> list[str]:
    center, reach = parts.mean[:, columns], N_STANDARD_DEVIATIONS * parts.deviation[:, columns]
    low, high = np.array([axes.get_xlim(), axes.get_ylim()]).T
    outside = np.flatnonzero(((center < low) | (center > high)).any(axis=1)).tolist()
    beyond = np.flatnonzero(((center - reach < low) & (center + reach > high)).any(axis=1)).tolist()
    notes = []
    if beyond:
        ids = _listed([str(parts.ids[rank]) for rank in beyond])
        notes.append(f"wider than this view: component{'s' * (len(beyond) > 1)} {ids}")
    if outside:
        share = _percent(float(parts.weights[outside].sum()))
        are = "component lies" if len(outside) == 1 else "components lie"
        ids = _listed([str(parts.ids[rank]) for rank in outside])
        notes.append(f"{len(outside)} {are} outside this view ({share} of the weight): {ids}")
    unlabelled = len(parts.ids) - len(outside) - N_LISTED
    if unlabelled > 0:
        notes.append(f"only the ids of the {N_LISTED} heaviest are written")
    return notes


def _draw_intervals(axes: Axes, parts: _Components, column: int) -> None:
    shown = min(len(parts.ids), N_LISTED)
    mean, deviation = parts.mean[:shown, column], parts.deviation[:shown, column]
    _set_axis(axes, "x", parts, column)
    for rank in range(shown):
        for reach, width in ((2.0, 3.0), (1.0, 8.0)):
            axes.plot(
                [mean[rank] - reach * deviation[rank], mean[rank] + reach * deviation[rank]],
                [rank, rank],
                color=parts.color(rank),
                linewidth=width,
                solid_capstyle="butt",
            )
    axes.plot(mean, np.arange(shown), linestyle="", marker="o", markersize=4, color=INK)
    _component_rows(axes, parts, shown)
    low, high = axes.get_xlim()
    outside = [str(parts.ids[rank]) for rank in range(shown) if not low <= mean[rank] <= high]
    notes = [f"centers outside this view: {_listed(outside)}"] if outside else []
    title = "Components (weight): mean, 1 and 2 standard deviations"
    _dress(axes, title, notes + _rest_note(parts, shown))
    axes.grid(color="#E6E6E6", linewidth=0.7, axis="x")


def _draw_shares(axes: Axes, parts: _Components, learner: OnlineEM | BatchEM) -> None:
    """Draw what share each category has in each component, for the two fields that tell them apart most."""
    from matplotlib.colors import to_rgb

    shown = min(len(parts.ids), N_LISTED)
    fields = [_shares(parts, learner, column) for column in range(len(parts.names))]
    fields = sorted(fields, key=lambda one: -one.effect)[:2]
    for place, field in enumerate(fields):
        left = 1.06 * place
        for rank in range(shown):
            start = left
            for position, (category, share) in enumerate(zip(field.categories, field.shares[rank].tolist())):
                strength = 0.9 - 0.7 * position / max(1, len(field.categories) - 1)
                color = strength * np.array(to_rgb(parts.color(rank))) + 1.0 - strength
                axes.barh(rank, share, left=start, height=0.7, color=color, edgecolor="white", linewidth=0.6)
                # About as many letters as fit.
                text = _shortened(category, int(share * 76.0 / len(fields)))
                axes.text(
                    start + 0.5 * share,
                    rank,
                    text,
                    fontsize=8.5,
                    color=INK if color @ [0.3, 0.59, 0.11] > 0.5 else "white",
                    ha="center",
                    va="center",
                    parse_math=False,
                )
                start += share
    axes.set_xlim(0.0, 1.06 * len(fields) - 0.06)
    axes.set_xticks(
        [0.5 + 1.06 * place for place in range(len(fields))],
        [field.name for field in fields],
        parse_math=False,
    )
    _component_rows(axes, parts, shown)
    which = "field" if len(fields) == 1 else "fields"
    _dress(axes, f"Components (weight): shares within the most telling {which}", _rest_note(parts, shown))
    axes.spines[["left", "bottom"]].set_visible(False)
    axes.tick_params(length=0)
    axes.tick_params(axis="x", labelsize=11)


class _Shares(NamedTuple):
    """The shares (K, C) of a field's categories, and how much of their variance lies between components."""

    name: str
    categories: list[str]
    shares: Array
    effect: float


def _shares(parts: _Components, learner: OnlineEM | BatchEM, column: int) -> _Shares:
    schema = learner.schema
    assert schema is not None
    field = schema.fields[column]
    if field.kind == "flag":
        truth = parts.mean[:, column]
        categories, shares = ["true", "false"], np.column_stack([truth, 1.0 - truth])
    else:
        family = learner.model.bind(schema).family
        shares = family.probabilities(learner.parameters.components, column)[parts.order]
        categories = [field.label(code) for code in range(field.n_codes)]
    whole = parts.weights @ shares
    between = float(parts.weights @ ((shares - whole) ** 2).sum(axis=1))
    effect = between / max(1.0 - float(whole @ whole), 1e-12)
    order = np.argsort(-whole, kind="stable")
    kept, rest = order[:N_CATEGORIES], order[N_CATEGORIES:]
    named = [categories[code] for code in kept]
    if len(rest):
        named.append(f"{len(rest)} more")
        shares = np.column_stack([shares[:, kept], shares[:, rest].sum(axis=1)])
    else:
        shares = shares[:, kept]
    return _Shares(parts.names[column], named, shares, effect)


def _draw_descriptions(axes: Axes, parts: _Components, learner: OnlineEM | BatchEM) -> None:
    """Draw a bar of its weight for each component, and beside it the fields that set the component apart."""
    shown = min(len(parts.ids), N_LISTED)
    fields_of = {one.id: one.fields for one in learner.describe()}
    heaviest = float(parts.weights[0])
    size = 10.0 if shown <= 15 else 8.5
    height = float(np.clip(0.06 * shown, 0.2, 0.7))
    for rank in range(shown):
        axes.barh(rank, parts.weights[rank], height=height, color=parts.color(rank))
        text = _description([(one.name, one.text) for one in fields_of[parts.ids[rank]]])
        axes.text(1.06 * heaviest, rank, text, fontsize=size, color=INK, va="center", parse_math=False)
    axes.set_xlim(0.0, 5.0 * heaviest)
    axes.set_xticks([])
    _component_rows(axes, parts, shown)
    _dress(axes, "Components (weight), and what sets each apart", _rest_note(parts, shown))
    axes.spines["bottom"].set_visible(False)


def _component_rows(axes: Axes, parts: _Components, shown: int) -> None:
    axes.set_ylim(shown - 0.4, -0.6)
    axes.set_yticks(range(shown), [f"{parts.ids[rank]}  ({parts.percent(rank)})" for rank in range(shown)])


def _rest_note(parts: _Components, shown: int) -> list[str]:
    rest = len(parts.ids) - shown
    if not rest:
        return []
    return [f"and {rest} lighter components, {_percent(float(parts.weights[shown:].sum()))} of the weight"]


def _description(fields: Sequence[tuple[str, str]]) -> str:
    text = ""
    for name, value in fields:
        part = f"{_shortened(name, 24)}: {_shortened(value, 28)}"
        if text and len(text) + len(part) > 62:
            break
        text += f"   {part}" if text else part
    return text


def _draw_weights_over_time(axes: Axes, parts: _Components, history: History) -> None:
    rows = [(float(n_events), parts.by_rank(weights)) for n_events, _, weights in history if weights is not None]
    known = [row for row in rows if math.isfinite(row[0]) and np.isfinite(row[1]).all()]
    notes = _left_out_note(len(rows) - len(known))
    if rows and len(rows) < len(history):
        notes.append(f"known from {rows[0][0]:,.0f} events on")
    _dress(axes, "Weights over time", notes)
    gone = any(row[1][-1] > 0.0 for row in known)
    _legend(axes, parts, gone=gone)
    if not known:
        _nothing_recorded(axes)
        return
    # No more points than the picture is wide, and the newest among them.
    known = known[:: -max(1, len(known) // N_STACKED)][::-1]
    n_events = np.array([row[0] for row in known])
    weights = np.array([row[1] for row in known]).T
    if len(known) == 1:
        n_events, weights = np.array([0.0, n_events[0]]), np.repeat(weights, 2, axis=1)
    layers = list(weights[: parts.n_colored])
    colors = list(PALETTE[: parts.n_colored])
    if len(parts.ids) > parts.n_colored:
        layers.append(weights[parts.n_colored : -1].sum(axis=0))
        colors.append(OTHERS)
    if gone:
        layers.append(weights[-1])
        colors.append(GONE)
    axes.stackplot(n_events, layers, colors=colors, linewidth=0.4, edgecolor="white")
    axes.set_ylim(0.0, 1.0)
    axes.set_yticks([0.0, 0.25, 0.5, 0.75, 1.0], ["0 %", "25 %", "50 %", "75 %", "100 %"])
    _events_axis(axes, history)


def _legend(axes: Axes, parts: _Components, *, gone: bool) -> None:
    from matplotlib.patches import Patch

    handles = [
        Patch(color=parts.color(rank), label=f"{parts.ids[rank]}   {parts.percent(rank)}")
        for rank in range(parts.n_colored)
    ]
    rest = len(parts.ids) - parts.n_colored
    if rest:
        share = _percent(float(parts.weights[parts.n_colored :].sum()))
        handles.append(Patch(color=OTHERS, label=f"{rest} more   {share}"))
    if gone:
        handles.append(Patch(color=GONE, label="gone"))
    axes.legend(
        handles=handles[::-1],
        title="component, weight",
        loc="upper left",
        bbox_to_anchor=(1.0, 1.03),
        frameon=False,
        fontsize=9.5,
        title_fontsize=9.5,
        handlelength=1.1,
        handleheight=1.1,
        labelcolor=INK,
    )


def _draw_log_likelihood(axes: Axes, history: History) -> None:
    n_events = np.array([row[0] for row in history], dtype=np.float64)
    mean = np.array([row[1] for row in history], dtype=np.float64)
    finite = np.isfinite(n_events) & np.isfinite(mean)
    n_events, mean = n_events[finite], mean[finite]
    notes = _left_out_note(int((~finite).sum()))
    title = "Log-likelihood over time"
    if not len(mean):
        _dress(axes, title, notes)
        _nothing_recorded(axes)
        return
    low, high = _likelihood_limits(mean)
    clipped = np.clip(mean, low, high)
    axes.plot(
        n_events,
        clipped,
        color=PALETTE[0],
        linewidth=1.6 if len(mean) <= 300 else 0.7,
        marker="o" if len(mean) <= 40 else "",
        markersize=3.5,
        clip_on=False,
    )
    for cut, marker, where in ((mean < low, "v", "below"), (mean > high, "^", "above")):
        if cut.any():
            axes.plot(n_events[cut], clipped[cut], linestyle="", marker=marker, color=PALETTE[1], clip_on=False)
            furthest = mean[cut][np.argmax(np.abs(mean[cut]))]
            notes.append(f"{int(cut.sum())} {where} this view, the furthest {furthest:.4g}")
    axes.set_ylim(low, high)
    axes.set_ylabel("mean per event, nats", fontsize=11, color=INK)
    axes.grid(color="#E6E6E6", linewidth=0.7)
    _events_axis(axes, history)
    _dress(axes, title, notes)


def _likelihood_limits(mean: Array) -> Limits:
    """Limits that hold all values, or all but the tails when those would flatten the rest."""
    low, high = np.quantile(mean, [0.03, 0.97])
    core = high - low
    start = float(mean.min()) if mean.min() >= low - 3.0 * core else float(low - 0.5 * core)
    stop = float(mean.max()) if mean.max() <= high + 3.0 * core else float(high + 0.5 * core)
    pad = 0.06 * (stop - start) or 0.05 * max(abs(start), 1.0)
    return start - pad, stop + pad


def _events_axis(axes: Axes, history: History) -> None:
    from matplotlib.ticker import EngFormatter

    n_events = np.array([row[0] for row in history], dtype=np.float64)
    axes.set_xlim(0.0, max(1.0, float(n_events[np.isfinite(n_events)].max())))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.set_xlabel("events", fontsize=11, color=INK)


def _nothing_recorded(axes: Axes) -> None:
    axes.text(0.5, 0.5, "nothing recorded", transform=axes.transAxes, ha="center", fontsize=12, color=QUIET)
    axes.set_xticks([])
    axes.set_yticks([])


def _left_out_note(n_left_out: int) -> list[str]:
    return [f"{n_left_out} row{'s' * (n_left_out != 1)} not finite, left out"] if n_left_out else []


def _dress(axes: Axes, title: str, notes: Sequence[str]) -> None:
    """Style the axes; notes stand between title and picture, where they cover nothing."""
    axes.set_title(title, loc="left", fontsize=11.5, color=INK, pad=6.0 + 13.0 * len(notes))
    axes.annotate(
        "\n".join(notes),
        (0.0, 1.0),
        (0.0, 5.0),
        xycoords="axes fraction",
        textcoords="offset points",
        fontsize=9.5,
        color=QUIET,
        va="bottom",
    )
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#9A9A9A")
    axes.tick_params(colors=INK, labelsize=9.5, length=3)
    axes.set_axisbelow(True)


def _percent(share: float) -> str:
    percent = 100.0 * share
    if percent >= 0.1 or percent == 0.0:
        return f"{percent:.1f} %"
    if percent < 0.0001:
        return "< 0.0001 %"
    return f"{percent:.4f}".rstrip("0") + " %"


def _listed(names: Sequence[str], longest: int = 12) -> str:
    return ", ".join(names[:longest]) + (f" and {len(names) - longest} more" if len(names) > longest else "")


def _shortened(name: str, longest: int = 44) -> str:
    """Put a name on one line; a long one loses its middle, as its ends tell fields apart."""
    name = " ".join(name.split())
    if len(name) <= longest:
        return name
    half = (longest - 1) // 2
    return f"{name[:half]}…{name[-half:]}" if half > 0 else ""
