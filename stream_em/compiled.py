"""Compiled steps on one event: E-step, discounted update and M-step in a single call.

All that a mixture has learned lies in one vector of doubles, so that a call passes one array: a header, a table
with a row for each factor of the family, the event, and for each factor its statistics, its parameters and the
pooled statistics that the prior is made from. A discount multiplies one scale instead of every array. The M-step
is taken by `OnlineEM`'s rule: at once for the components that the event belongs to, for the others with the next
whole mini-batch. The formulas are those of the families, and both paths agree to rounding.
"""

# mypy: disable-error-code="no-any-return"

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import Any, TypeVar, cast

import numpy as np
from numba import njit, types

from stream_em.families import Bernoulli, Exponential, Poisson
from stream_em.families.categorical import SMALLEST_PROBABILITY
from stream_em.families.gaussian import CONSTANT_DEVIATION, LOG_TWO_PI, ROUNDING_OF_SQUARES, SMALLEST_VARIANCE
from stream_em.numerics import LARGEST_LOG_DENSITY, LARGEST_VALUE, SMALLEST_RELATIVE_PIVOT, SMALLEST_WEIGHT, Array
from stream_em.schedules import LEAST_SHARE
from stream_em.schema import LARGEST_COUNT

VECTOR = types.Array(types.float64, 1, "C")

# Slots of the header. Places are positions in the vector.
N_COMPONENTS, N_FIELDS, N_FACTORS, HARD = 0, 1, 2, 3
EVENT, KINDS, SHARES, WEIGHTS, NORMALIZERS, WORK = 4, 5, 6, 7, 8, 9
SCALE, PRIOR_WEIGHT, STATE_WEIGHT, LOG_LIKELIHOOD, N_EVENTS, TOTAL_WEIGHT, N_UPDATES = 10, 11, 12, 13, 14, 15, 16
BATCH_SIZE, SCHEDULE, ALPHA, OFFSET, SPAN, WINNER, LOG_PROB = 17, 18, 19, 20, 21, 22, 23
HEADER = 24

# Slots of a factor's row. What a family has no use for stays 0.
KIND, SIZE, FIRST, N_CODES = 0, 1, 2, 3
WEIGHT, MEAN, SCATTER = 4, 5, 6
LOCATION, SPREAD, FACTOR, ROOT, CONSTANT = 7, 8, 9, 10, 11
POOLED_WEIGHT, POOLED_MEAN, POOLED_SCATTER, REGULARIZATION = 12, 13, 14, 15
ROW = 16

# The same slots, by what other families keep there.
PRECISION = ROOT
SLOPE, INTERCEPT = FACTOR, ROOT
CODES = CONSTANT

CATEGORICAL, BERNOULLI, POISSON, EXPONENTIAL, DIAGONAL, SPHERICAL, TIED, FULL = range(8)
NUMERIC, CATEGORY, FLAG, COUNT, DURATION = range(5)
HARMONIC, ROBBINS_MONRO, CONSTANT_STEP = range(3)

# exp(-45) of an event changes no double-precision sum.
NEGLIGIBLE_LOG_SHARE = 45.0
SMALLEST_SCALE = 1e-100

# Fields that tell which component to try first.
N_GLANCED = 3

SMALLEST_CHANCE, LARGEST_CHANCE = Bernoulli.mean_range
SMALLEST_RATE, LARGEST_RATE = Poisson.mean_range
SMALLEST_DURATION, LARGEST_DURATION = Exponential.mean_range

LN2_HIGH, LN2_LOW = 6.93147180369123816490e-01, 1.90821492927058770002e-10
SQRT_HALF_BITS = int(np.float64(0.5**0.5).view(np.int64))

# Positions are unsigned, so that no access has to look for a negative index.
at = np.uint64

# No traps on division, and sums in any order: without them the loops are not vectorised.
OPTIONS: dict[str, Any] = {
    "cache": True,
    "error_model": "numpy",
    "fastmath": {"contract", "nsz", "reassoc"},
    "no_cfunc_wrapper": True,
    "nogil": True,
}

Function = TypeVar("Function", bound=Callable[..., Any])


def _compile(function: Function, **more: Any) -> Any:
    options = OPTIONS | more
    try:
        return njit(**options)(function)
    except RuntimeError:
        # There is no place where the compiled code could be kept.
        return njit(**options | {"cache": False})(function)


def compiled(function: Function) -> Function:
    """Compile a function that only compiled code calls: a wrapper for Python would take as long to compile."""
    return cast(Function, _compile(function, no_cpython_wrapper=True))


def compiled_in_order(function: Function) -> Function:
    """Compile like `compiled`, but for arithmetic in the order in which it is written."""
    return cast(Function, _compile(function, no_cpython_wrapper=True, fastmath={"contract", "nsz"}))


def entry(function: Function) -> Any:
    """Compile a function that Python calls."""
    return _compile(function)


@compiled_in_order
def take_logarithm(values: Array) -> None:
    """Replace normal values > 0 by their logarithms, without a call for each.

    With v = 2^k m and m in [sqrt(1/2), sqrt(2)), log(m) = 2 artanh((m - 1) / (m + 1)), whose series is exact to
    rounding at the 21st power.
    """
    bits = values.view(np.int64)
    for i in range(len(values)):
        # The bits from that of sqrt(1/2) on count up to the next power of two there.
        above = bits[i] - SQRT_HALF_BITS
        k = above >> 52
        bits[i] -= k << 52
        mantissa = values[i]
        t = (mantissa - 1.0) / (mantissa + 1.0)
        square = t * t
        series = 1.0 / 21.0
        series = series * square + 1.0 / 19.0
        series = series * square + 1.0 / 17.0
        series = series * square + 1.0 / 15.0
        series = series * square + 1.0 / 13.0
        series = series * square + 1.0 / 11.0
        series = series * square + 1.0 / 9.0
        series = series * square + 1.0 / 7.0
        series = series * square + 1.0 / 5.0
        series = series * square + 1.0 / 3.0
        log_mantissa = 2.0 * (t + t * (square * series))
        values[i] = k * LN2_HIGH + (k * LN2_LOW + log_mantissa)


@compiled
def _usable(state: Array, gaps: Any) -> bool:
    """Whether every value is in its field's range, and at least one is there, or all where there are no gaps."""
    event, kinds = int(state[EVENT]), int(state[KINDS])
    seen = False
    for field in range(int(state[N_FIELDS])):
        value = state[at(event + field)]
        if gaps is not None and math.isnan(value):
            continue
        seen = True
        kind = int(state[at(kinds + field)])
        if not abs(value) <= LARGEST_VALUE:
            return False
        if kind == FLAG and value != 0.0 and value != 1.0:
            return False
        if kind >= COUNT and value < 0.0:
            return False
        if kind == COUNT and (value > LARGEST_COUNT or value != math.floor(value)):
            return False
    return seen


@compiled
def _factorize(state: Array, matrix: int, factor: int, root: int, size: int, n_wanted: int) -> float:
    """Write the lower Cholesky factor of a symmetric matrix and the inverses of its diagonal.

    Return the log-density at the mean of its first `n_wanted` fields, NaN when the matrix is not safely positive
    definite. Only the lower half is read and written.
    """
    log_density = -0.5 * LOG_TWO_PI * n_wanted
    product = 1.0
    for i in range(size):
        row = factor + i * size
        pivot = state[at(matrix + i * size + i)]
        limit = SMALLEST_RELATIVE_PIVOT * pivot
        for j in range(i):
            other = factor + j * size
            value = state[at(matrix + i * size + j)]
            for m in range(j):
                value -= state[at(row + m)] * state[at(other + m)]
            value *= state[at(root + j)]
            state[at(row + j)] = value
            pivot -= value * value
        if not pivot >= limit:
            return np.nan
        inverse = 1.0 / math.sqrt(pivot)
        state[at(row + i)] = pivot * inverse
        state[at(root + i)] = inverse
        if i < n_wanted:
            product *= inverse
            if product < 1e-150 or product > 1e150:
                log_density += math.log(product)
                product = 1.0
    return log_density + math.log(product)


@compiled
def _observed_first(state: Array, row: int) -> int:
    """Write the order of a factor's fields that has the observed ones first; return how many these are."""
    size, value = int(state[row + SIZE]), int(state[EVENT]) + int(state[row + FIRST])
    order = int(state[WORK])
    n_observed, n_missing = 0, 0
    for field in range(size):
        if math.isnan(state[at(value + field)]):
            n_missing += 1
            state[at(order + size - n_missing)] = field
        else:
            state[at(order + n_observed)] = field
            n_observed += 1
    return n_observed


@compiled
def _condition(state: Array, row: int, component: int, n_observed: int) -> float:
    """Factorize a covariance with the observed fields first; return the log-density at their mean.

    The lower right block of the factor is then that of the conditional covariance of the missing fields, and
    the lower left one their regression on the standardized observed ones.
    """
    size, tied = int(state[row + SIZE]), int(state[row + KIND]) == TIED
    order = int(state[WORK])
    matrix = order + 3 * size
    covariance = int(state[row + SPREAD]) + (0 if tied else component * size * size)
    for i in range(size):
        first = int(state[at(order + i)])
        for j in range(i + 1):
            second = int(state[at(order + j)])
            place = max(first, second) * size + min(first, second)
            state[at(matrix + i * size + j)] = state[at(covariance + place)]
    return _factorize(state, matrix, matrix + size * size, order + 2 * size, size, n_observed)


@compiled
def _standardize(state: Array, row: int, component: int, n_observed: int) -> float:
    """Write the standardized deviation of the observed fields from a component, in the order of `_condition`."""
    size, value = int(state[row + SIZE]), int(state[EVENT]) + int(state[row + FIRST])
    order = int(state[WORK])
    deviation, root, factor = order + size, order + 2 * size, order + 3 * size + size * size
    location = int(state[row + LOCATION]) + component * size
    squares = 0.0
    for i in range(n_observed):
        field = int(state[at(order + i)])
        standardized = state[at(value + field)] - state[at(location + field)]
        for j in range(i):
            standardized -= state[at(factor + i * size + j)] * state[at(deviation + j)]
        standardized *= state[at(root + i)]
        state[at(deviation + i)] = standardized
        squares += standardized * standardized
    return squares


@compiled
def _add_joint(state: Array, row: int, span: float) -> None:
    """Add a factor's log-density to that of each component, but for the constants; stop where it falls too low.

    What lies more than `span` below the best is not worth finishing.
    """
    n_components, shares = int(state[N_COMPONENTS]), int(state[SHARES])
    size, tied = int(state[row + SIZE]), int(state[row + KIND]) == TIED
    value, deviation = int(state[EVENT]) + int(state[row + FIRST]), int(state[WORK])
    locations, factors, roots = int(state[row + LOCATION]), int(state[row + FACTOR]), int(state[row + ROOT])
    best = -np.inf
    # With the likely winner first, the others are given up early.
    component = _likely_winner(state, row)
    for _ in range(n_components):
        density, limit = state[at(shares + component)], best - span
        location = locations + component * size
        factor, root = factors, roots
        if not tied:
            factor, root = factors + component * size * size, roots + component * size
        for i in range(size):
            standardized = state[at(value + i)] - state[at(location + i)]
            for j in range(i):
                standardized -= state[at(factor + j)] * state[at(deviation + j)]
            standardized *= state[at(root + i)]
            state[at(deviation + i)] = standardized
            density -= 0.5 * standardized * standardized
            if density < limit:
                break
            factor += size
        state[at(shares + component)] = density
        best = max(best, density)
        component = component + 1 if component + 1 < n_components else 0


@compiled
def _likely_winner(state: Array, row: int) -> int:
    """Return the component nearest in a few fields or, with few fields, the last winner."""
    size = int(state[row + SIZE])
    if int(state[row + KIND]) != FULL or size <= 2 * N_GLANCED:
        return int(state[WINNER])
    value, location = int(state[EVENT]) + int(state[row + FIRST]), int(state[row + LOCATION])
    root = int(state[row + ROOT])
    winner, nearest = 0, np.inf
    for component in range(int(state[N_COMPONENTS])):
        distance = 0.0
        for i in range(N_GLANCED):
            standardized = (state[at(value + i)] - state[at(location + i)]) * state[at(root + i)]
            distance += standardized * standardized
        if distance < nearest:
            winner, nearest = component, distance
        location += size
        root += size
    return winner


@compiled
def _add_separate(state: Array, row: int) -> None:
    """Add a factor's log-density to that of each component, but for the constants; fields may be missing."""
    shares, size = int(state[SHARES]), int(state[row + SIZE])
    value = int(state[EVENT]) + int(state[row + FIRST])
    location, precision = int(state[row + LOCATION]), int(state[row + PRECISION])
    for component in range(int(state[N_COMPONENTS])):
        squares = 0.0
        for i in range(size):
            deviation = state[at(value + i)] - state[at(location + i)]
            if not math.isnan(deviation):
                squares += deviation * deviation * state[at(precision + i)]
        state[at(shares + component)] -= 0.5 * squares
        location += size
        precision += size


@compiled
def _add_means(state: Array, row: int) -> None:
    shares, size = int(state[SHARES]), int(state[row + SIZE])
    value = int(state[EVENT]) + int(state[row + FIRST])
    slope, intercept = int(state[row + SLOPE]), int(state[row + INTERCEPT])
    for component in range(int(state[N_COMPONENTS])):
        density = 0.0
        for i in range(size):
            if not math.isnan(state[at(value + i)]):
                density += state[at(slope + i)] * state[at(value + i)] + state[at(intercept + i)]
        state[at(shares + component)] += density
        slope += size
        intercept += size


@compiled
def _add_categories(state: Array, row: int) -> None:
    shares, size, n_codes = int(state[SHARES]), int(state[row + SIZE]), int(state[row + N_CODES])
    value, codes = int(state[EVENT]) + int(state[row + FIRST]), int(state[row + CODES])
    for component in range(int(state[N_COMPONENTS])):
        start = int(state[row + LOCATION]) + component * n_codes
        # One logarithm of the product, unless that would leave the range of doubles.
        density, product = 0.0, 1.0
        for i in range(size):
            code = state[at(value + i)]
            if not math.isnan(code):
                product *= state[at(start + int(code))]
                if product < 1e-250:
                    density += math.log(product)
                    product = 1.0
            start += int(state[at(codes + i)])
        state[at(shares + component)] += density + math.log(product)


@compiled
def _add_with_gaps(state: Array, row: int) -> None:
    """Add a Gaussian factor's log-density where values are missing, its constants replaced."""
    shares, size, kind = int(state[SHARES]), int(state[row + SIZE]), int(state[row + KIND])
    constant, value = int(state[row + CONSTANT]), int(state[EVENT]) + int(state[row + FIRST])
    if kind < TIED:
        for component in range(int(state[N_COMPONENTS])):
            for i in range(size):
                if math.isnan(state[at(value + i)]):
                    state[at(shares + component)] -= state[at(constant + component * size + i)]
        _add_separate(state, row)
        return
    n_observed = _observed_first(state, row)
    if n_observed == size:
        _add_joint(state, row, np.inf)
        return
    for component in range(int(state[N_COMPONENTS])):
        known = state[at(constant + (0 if kind == TIED else component))]
        own = _condition(state, row, component, n_observed)
        squares = _standardize(state, row, component, n_observed)
        state[at(shares + component)] += own - known - 0.5 * squares


@compiled
def _expect(state: Array, gaps: Any, general: Any) -> float:
    """Write the responsibilities of the event and return its log-density, NaN where a covariance fails."""
    n_components, n_factors = int(state[N_COMPONENTS]), int(state[N_FACTORS])
    shares, weights, normalizers = int(state[SHARES]), int(state[WEIGHTS]), int(state[NORMALIZERS])
    for component in range(n_components):
        state[at(shares + component)] = state[at(normalizers + component)]
    for index in range(n_factors):
        row = HEADER + index * ROW
        kind = int(state[row + KIND])
        if general is not None and kind == CATEGORICAL:
            _add_categories(state, row)
        elif general is not None and kind < DIAGONAL:
            _add_means(state, row)
        elif gaps is not None:
            _add_with_gaps(state, row)
        elif general is not None and kind < TIED:
            _add_separate(state, row)
        else:
            # Only the last factor may be left unfinished: what comes after could raise the density.
            _add_joint(state, row, state[SPAN] if index == n_factors - 1 else np.inf)
    # Beyond the range of doubles every component is equally far.
    best = -LARGEST_LOG_DENSITY
    for component in range(n_components):
        if math.isnan(state[at(shares + component)]):
            return np.nan
        best = max(best, state[at(shares + component)])
    limit = best - state[SPAN]
    pseudo = state[PRIOR_WEIGHT] / state[SCALE]
    total, everything, largest, winner = 0.0, 0.0, -1.0, 0
    for component in range(n_components):
        weight = state[at(weights + component)] + pseudo
        everything += weight
        density = max(state[at(shares + component)], -LARGEST_LOG_DENSITY)
        share = weight * math.exp(density - best) if density >= limit else 0.0
        state[at(shares + component)] = share
        total += share
        if share > largest:
            largest, winner = share, component
    inverse = 1.0 / total
    for component in range(n_components):
        state[at(shares + component)] *= inverse
    state[WINNER] = winner
    log_prob = best + math.log(total / everything)
    if general is not None:
        log_prob += _base_measure(state)
    return log_prob


@compiled
def _base_measure(state: Array) -> float:
    measure = 0.0
    for index in range(int(state[N_FACTORS])):
        row = HEADER + index * ROW
        if int(state[row + KIND]) == POISSON:
            value = int(state[EVENT]) + int(state[row + FIRST])
            for i in range(int(state[row + SIZE])):
                if not math.isnan(state[at(value + i)]):
                    measure -= math.lgamma(state[at(value + i)] + 1.0)
    return measure


@compiled
def _complete(state: Array, row: int, component: int, weight: float, n_observed: int) -> None:
    """Write the deviation of an event whose missing fields are at their conditional expectation.

    Their conditional covariance joins the scatter (Ghahramani & Jordan 1994).
    """
    size, tied = int(state[row + SIZE]), int(state[row + KIND]) == TIED
    value, order = int(state[EVENT]) + int(state[row + FIRST]), int(state[WORK])
    mean, deviation = int(state[row + MEAN]) + component * size, order + size
    scatter = int(state[row + SCATTER]) + (0 if tied else component * size * size)
    _condition(state, row, component, n_observed)
    _standardize(state, row, component, n_observed)
    location = int(state[row + LOCATION]) + component * size
    factor = order + 3 * size + size * size
    completed = order + 2 * size
    for i in range(n_observed, size):
        field = int(state[at(order + i)])
        expected = state[at(location + field)]
        for j in range(n_observed):
            expected += state[at(factor + i * size + j)] * state[at(deviation + j)]
        state[at(completed + i)] = expected
        for other in range(n_observed, i + 1):
            residual = 0.0
            for m in range(n_observed, other + 1):
                residual += state[at(factor + i * size + m)] * state[at(factor + other * size + m)]
            second = int(state[at(order + other)])
            state[at(scatter + max(field, second) * size + min(field, second))] += weight * residual
    for i in range(n_observed, size):
        field = int(state[at(order + i)])
        state[at(deviation + field)] = state[at(completed + i)] - state[at(mean + field)]
    for i in range(n_observed):
        field = int(state[at(order + i)])
        state[at(deviation + field)] = state[at(value + field)] - state[at(mean + field)]


@compiled
def _absorb_joint(state: Array, row: int, component: int, weight: float, gaps: Any) -> None:
    """Merge the event into mean and scatter of a component, Chan-Golub-LeVeque; missing fields are completed."""
    size, tied = int(state[row + SIZE]), int(state[row + KIND]) == TIED
    value, order = int(state[EVENT]) + int(state[row + FIRST]), int(state[WORK])
    mean = int(state[row + MEAN]) + component * size
    scatter = int(state[row + SCATTER]) + (0 if tied else component * size * size)
    old = state[at(int(state[WEIGHTS]) + component)]
    share = weight / (old + weight)
    deviation = order + size
    n_observed = size
    if gaps is not None:
        n_observed = _observed_first(state, row)
    if gaps is not None and n_observed < size:
        _complete(state, row, component, weight, n_observed)
    else:
        for i in range(size):
            state[at(deviation + i)] = state[at(value + i)] - state[at(mean + i)]
    for i in range(size):
        state[at(mean + i)] += share * state[at(deviation + i)]
    reduced = old * share
    for i in range(size):
        product = reduced * state[at(deviation + i)]
        for j in range(i + 1):
            state[at(scatter + i * size + j)] += product * state[at(deviation + j)]


@compiled
def _absorb_moments(state: Array, value: int, size: int, weight: int, mean: int, scatter: int, new: float) -> None:
    """Merge an event's observed values, with weight `new`, into the weight, mean and scatter of each field."""
    for i in range(size):
        if math.isnan(state[at(value + i)]):
            continue
        old = state[at(weight + i)]
        share = new / (old + new)
        deviation = state[at(value + i)] - state[at(mean + i)]
        state[at(weight + i)] = old + new
        state[at(mean + i)] += share * deviation
        state[at(scatter + i)] += old * share * deviation * deviation


@compiled
def _absorb_sums(state: Array, value: int, size: int, weight: int, total: int, new: float) -> None:
    for i in range(size):
        if not math.isnan(state[at(value + i)]):
            state[at(weight + i)] += new
            state[at(total + i)] += new * state[at(value + i)]


@compiled
def _absorb_codes(state: Array, row: int, counts: int, new: float) -> None:
    value, codes = int(state[EVENT]) + int(state[row + FIRST]), int(state[row + CODES])
    for i in range(int(state[row + SIZE])):
        code = state[at(value + i)]
        if not math.isnan(code):
            state[at(counts + int(code))] += new
        counts += int(state[at(codes + i)])


@compiled
def _absorb(state: Array, weight: float, gaps: Any, general: Any) -> None:
    """Merge the event, with this weight in units of the scale, into statistics and pooled statistics."""
    n_components, shares, weights = int(state[N_COMPONENTS]), int(state[SHARES]), int(state[WEIGHTS])
    for index in range(int(state[N_FACTORS])):
        row = HEADER + index * ROW
        kind, size = int(state[row + KIND]), int(state[row + SIZE])
        value = int(state[EVENT]) + int(state[row + FIRST])
        own_weight, mean, scatter = int(state[row + WEIGHT]), int(state[row + MEAN]), int(state[row + SCATTER])
        for component in range(n_components):
            new = weight * state[at(shares + component)]
            if new == 0.0:
                continue
            start = component * size
            if general is None or kind >= TIED:
                _absorb_joint(state, row, component, new, gaps)
            elif kind < DIAGONAL:
                _absorb_other(state, row, component, new)
            else:
                _absorb_moments(state, value, size, own_weight + start, mean + start, scatter + start, new)
    for component in range(n_components):
        state[at(weights + component)] += weight * state[at(shares + component)]
    for index in range(int(state[N_FACTORS])):
        row = HEADER + index * ROW
        kind, size = int(state[row + KIND]), int(state[row + SIZE])
        value = int(state[EVENT]) + int(state[row + FIRST])
        pooled_weight, pooled_mean = int(state[row + POOLED_WEIGHT]), int(state[row + POOLED_MEAN])
        if general is not None and kind < DIAGONAL:
            _absorb_other(state, row, -1, weight)
        elif gaps is not None and kind >= TIED:
            _pool_joint(state, row)
        else:
            pooled_scatter = int(state[row + POOLED_SCATTER])
            _absorb_moments(state, value, size, pooled_weight, pooled_mean, pooled_scatter, weight)


@compiled
def _absorb_other(state: Array, row: int, component: int, new: float) -> None:
    """Merge the event into counts or sums: those of a component, or the pooled ones where it is -1."""
    size, value = int(state[row + SIZE]), int(state[EVENT]) + int(state[row + FIRST])
    if int(state[row + KIND]) == CATEGORICAL:
        n_codes = int(state[row + N_CODES])
        counts = int(state[row + POOLED_MEAN]) if component < 0 else int(state[row + MEAN]) + component * n_codes
        _absorb_codes(state, row, counts, new)
    elif component < 0:
        _absorb_sums(state, value, size, int(state[row + POOLED_WEIGHT]), int(state[row + POOLED_MEAN]), new)
    else:
        start = component * size
        _absorb_sums(state, value, size, int(state[row + WEIGHT]) + start, int(state[row + MEAN]) + start, new)


@compiled
def _pool_joint(state: Array, row: int) -> None:
    """Pool the statistics of all components, which are those of all events, where fields depend on each other."""
    n_components, weights, tied = int(state[N_COMPONENTS]), int(state[WEIGHTS]), int(state[row + KIND]) == TIED
    size, mean, scatter = int(state[row + SIZE]), int(state[row + MEAN]), int(state[row + SCATTER])
    pooled_weight, pooled_mean = int(state[row + POOLED_WEIGHT]), int(state[row + POOLED_MEAN])
    pooled_scatter = int(state[row + POOLED_SCATTER])
    for i in range(size):
        total, average = 0.0, 0.0
        for component in range(n_components):
            weight = state[at(weights + component)]
            total += weight
            average += weight * state[at(mean + component * size + i)]
        average /= max(total, SMALLEST_WEIGHT)
        spread = state[at(scatter + i * size + i)] if tied else 0.0
        for component in range(n_components):
            place = component * size + i
            deviation = state[at(mean + place)] - average
            spread += state[at(weights + component)] * deviation * deviation
            if not tied:
                spread += state[at(scatter + place * size + i)]
        state[at(pooled_weight + i)] = total
        state[at(pooled_mean + i)] = average
        state[at(pooled_scatter + i)] = spread


@compiled
def _write_pooled_variances(state: Array, row: int) -> None:
    """Write the variance of each field over all events behind the place for deviations."""
    size = int(state[row + SIZE])
    pooled_weight, pooled_mean = int(state[row + POOLED_WEIGHT]), int(state[row + POOLED_MEAN])
    pooled_scatter, variances = int(state[row + POOLED_SCATTER]), int(state[WORK]) + size
    for i in range(size):
        mean = state[at(pooled_mean + i)]
        variance = state[at(pooled_scatter + i)] / max(state[at(pooled_weight + i)], SMALLEST_WEIGHT)
        if variance <= max(ROUNDING_OF_SQUARES * mean * mean, SMALLEST_VARIANCE):
            unit = mean if abs(mean) > math.sqrt(SMALLEST_VARIANCE) else 1.0
            variance = (CONSTANT_DEVIATION * unit) ** 2
        state[at(variances + i)] = variance


@compiled
def _maximize_full(state: Array, row: int, component: int, pseudo: float) -> bool:
    size = int(state[row + SIZE])
    deviation, start = int(state[WORK]), component * size
    mean, location = int(state[row + MEAN]) + start, int(state[row + LOCATION]) + start
    scatter, spread = int(state[row + SCATTER]) + start * size, int(state[row + SPREAD]) + start * size
    pooled_mean, variances = int(state[row + POOLED_MEAN]), deviation + size
    weight = state[at(int(state[WEIGHTS]) + component)]
    inverse = 1.0 / (weight + pseudo)
    share = weight * inverse
    for i in range(size):
        state[at(deviation + i)] = state[at(mean + i)] - state[at(pooled_mean + i)]
        state[at(location + i)] = state[at(pooled_mean + i)] + share * state[at(deviation + i)]
    for i in range(size):
        between = pseudo * share * state[at(deviation + i)]
        for j in range(i + 1):
            place = i * size + j
            state[at(spread + place)] = (state[at(scatter + place)] + between * state[at(deviation + j)]) * inverse
        state[at(spread + i * size + i)] += pseudo * state[at(variances + i)] * inverse + state[row + REGULARIZATION]
    return _prepare_joint(state, row, component)


@compiled
def _maximize_tied(state: Array, row: int, pseudo: float, everything: bool) -> bool:
    """M-step of a tied covariance, which every event changes, and of the means that are due."""
    n_components, weights, shares = int(state[N_COMPONENTS]), int(state[WEIGHTS]), int(state[SHARES])
    size, deviation = int(state[row + SIZE]), int(state[WORK])
    scatter, spread, pooled_mean = int(state[row + SCATTER]), int(state[row + SPREAD]), int(state[row + POOLED_MEAN])
    total = n_components * pseudo
    for component in range(n_components):
        total += state[at(weights + component)]
    for i in range(size):
        for j in range(i + 1):
            state[at(spread + i * size + j)] = state[at(scatter + i * size + j)]
        state[at(spread + i * size + i)] += n_components * pseudo * state[at(deviation + size + i)]
    for component in range(n_components):
        start = component * size
        mean, location = int(state[row + MEAN]) + start, int(state[row + LOCATION]) + start
        seen = state[at(weights + component)]
        share = seen / (seen + pseudo)
        due = everything or state[at(shares + component)] > LEAST_SHARE
        for i in range(size):
            state[at(deviation + i)] = state[at(mean + i)] - state[at(pooled_mean + i)]
            if due:
                state[at(location + i)] = state[at(pooled_mean + i)] + share * state[at(deviation + i)]
        for i in range(size):
            between = pseudo * share * state[at(deviation + i)]
            for j in range(i + 1):
                state[at(spread + i * size + j)] += between * state[at(deviation + j)]
    for i in range(size):
        for j in range(i + 1):
            state[at(spread + i * size + j)] /= total
        state[at(spread + i * size + i)] += state[row + REGULARIZATION]
    return _prepare_joint(state, row, 0)


@compiled
def _maximize_separate(state: Array, row: int, component: int, pseudo: float) -> None:
    size, start = int(state[row + SIZE]), component * int(state[row + SIZE])
    own_weight, mean = int(state[row + WEIGHT]) + start, int(state[row + MEAN]) + start
    scatter, location = int(state[row + SCATTER]) + start, int(state[row + LOCATION]) + start
    spread, pooled_mean = int(state[row + SPREAD]) + start, int(state[row + POOLED_MEAN])
    variances, regularization = int(state[WORK]) + size, state[row + REGULARIZATION]
    # Loops that write one array each are vectorised, since few places have to be told apart.
    for i in range(size):
        weight = state[at(own_weight + i)]
        deviation = state[at(mean + i)] - state[at(pooled_mean + i)]
        state[at(location + i)] = state[at(pooled_mean + i)] + weight / (weight + pseudo) * deviation
    all_scatter, all_weight = 0.0, 0.0
    for i in range(size):
        weight = state[at(own_weight + i)]
        inverse = 1.0 / (weight + pseudo)
        deviation = state[at(mean + i)] - state[at(pooled_mean + i)]
        completed = state[at(variances + i)] + weight * inverse * deviation * deviation
        completed = state[at(scatter + i)] + pseudo * completed
        all_scatter += completed
        all_weight += weight + pseudo
        state[at(spread + i)] = completed * inverse + regularization
    if int(state[row + KIND]) == SPHERICAL:
        for i in range(size):
            state[at(spread + i)] = all_scatter / all_weight + regularization
    _prepare_separate(state, row, component)


@compiled
def _pooled_expectation(state: Array, row: int, field: int) -> float:
    """Mean of all the events for the families that are known by it, within range."""
    scale, kind = state[SCALE], int(state[row + KIND])
    weight = scale * state[at(int(state[row + POOLED_WEIGHT]) + field)]
    total = scale * state[at(int(state[row + POOLED_MEAN]) + field)]
    if kind != EXPONENTIAL:
        return _within_range((total + 0.5) / (weight + 1.0), kind)
    return _within_range(total / weight if total > 0.0 and weight > 0.0 else 1.0, kind)


@compiled
def _within_range(mean: float, kind: int) -> float:
    if kind == BERNOULLI:
        return min(max(mean, SMALLEST_CHANCE), LARGEST_CHANCE)
    if kind == POISSON:
        return min(max(mean, SMALLEST_RATE), LARGEST_RATE)
    return min(max(mean, SMALLEST_DURATION), LARGEST_DURATION)


@compiled
def _maximize_mean(state: Array, row: int, component: int, pseudo: float) -> None:
    size, kind = int(state[row + SIZE]), int(state[row + KIND])
    start = component * size
    own_weight, total = int(state[row + WEIGHT]) + start, int(state[row + MEAN]) + start
    location = int(state[row + LOCATION]) + start
    for i in range(size):
        expected = state[at(total + i)] + pseudo * _pooled_expectation(state, row, i)
        state[at(location + i)] = _within_range(expected / (state[at(own_weight + i)] + pseudo), kind)
    _prepare_mean(state, row, component)


@compiled
def _maximize_category(state: Array, row: int, component: int, pseudo: float) -> None:
    n_codes, codes = int(state[row + N_CODES]), int(state[row + CODES])
    counts, probability = int(state[row + MEAN]), int(state[row + LOCATION])
    counts, probability = counts + component * n_codes, probability + component * n_codes
    pooled, scale = int(state[row + POOLED_MEAN]), state[SCALE]
    for i in range(int(state[row + SIZE])):
        size = int(state[at(codes + i)])
        even, seen, total = 1.0 / size, 0.0, 0.0
        for code in range(size):
            seen += state[at(pooled + code)]
        share = pseudo / (scale * seen + 1.0)
        for code in range(size):
            prior = max((scale * state[at(pooled + code)] + even) * share, pseudo * SMALLEST_PROBABILITY)
            count = state[at(counts + code)] + prior
            state[at(probability + code)] = count
            total += count
        inverse = 1.0 / max(total, SMALLEST_WEIGHT)
        for code in range(size):
            state[at(probability + code)] = max(state[at(probability + code)] * inverse, SMALLEST_PROBABILITY)
        counts, probability, pooled = counts + size, probability + size, pooled + size


@compiled
def _prepare_joint(state: Array, row: int, component: int) -> bool:
    """Factorize a covariance for `_joint_density`; return whether that was safe."""
    size, start = int(state[row + SIZE]), component * int(state[row + SIZE])
    matrix, factor = int(state[row + SPREAD]) + start * size, int(state[row + FACTOR]) + start * size
    constant = _factorize(state, matrix, factor, int(state[row + ROOT]) + start, size, size)
    state[at(int(state[row + CONSTANT]) + component)] = constant
    return not math.isnan(constant)


@compiled
def _prepare_separate(state: Array, row: int, component: int) -> None:
    size, start = int(state[row + SIZE]), component * int(state[row + SIZE])
    spread, constant = int(state[row + SPREAD]) + start, int(state[row + CONSTANT]) + start
    precision = int(state[row + PRECISION]) + start
    for i in range(size):
        state[at(precision + i)] = 1.0 / state[at(spread + i)]
    constants = state[constant : constant + size]
    for i in range(size):
        constants[i] = state[at(spread + i)]
    take_logarithm(constants)
    for i in range(size):
        constants[i] = -0.5 * (LOG_TWO_PI + constants[i])


@compiled
def _prepare_mean(state: Array, row: int, component: int) -> None:
    size, kind, start = int(state[row + SIZE]), int(state[row + KIND]), component * int(state[row + SIZE])
    location, slope = int(state[row + LOCATION]) + start, int(state[row + SLOPE]) + start
    intercept = int(state[row + INTERCEPT]) + start
    for i in range(size):
        mean = state[at(location + i)]
        if kind == BERNOULLI:
            false = math.log1p(-mean)
            state[at(slope + i)], state[at(intercept + i)] = math.log(mean) - false, false
        elif kind == POISSON:
            state[at(slope + i)], state[at(intercept + i)] = math.log(mean), -mean
        else:
            state[at(slope + i)], state[at(intercept + i)] = -1.0 / mean, -math.log(mean)


@compiled
def _normalize(state: Array, component: int) -> None:
    """Sum the constants of a component's Gaussian factors, where nothing is missing."""
    normalizer = 0.0
    for index in range(int(state[N_FACTORS])):
        row = HEADER + index * ROW
        kind, size, constant = int(state[row + KIND]), int(state[row + SIZE]), int(state[row + CONSTANT])
        if kind >= TIED:
            normalizer += state[at(constant + (0 if kind == TIED else component))]
        elif kind >= DIAGONAL:
            for i in range(size):
                normalizer += state[at(constant + component * size + i)]
    state[at(int(state[NORMALIZERS]) + component)] = normalizer


@compiled
def _maximize(state: Array, everything: bool, general: Any) -> bool:
    """M-step of the components that are due; return whether every covariance could be factorized."""
    n_components, shares = int(state[N_COMPONENTS]), int(state[SHARES])
    pseudo = state[PRIOR_WEIGHT] / state[SCALE]
    safe, tied = True, False
    for index in range(int(state[N_FACTORS])):
        row = HEADER + index * ROW
        kind = int(state[row + KIND])
        if general is None or kind >= DIAGONAL:
            _write_pooled_variances(state, row)
        if general is not None and kind == TIED:
            tied = True
            safe &= _maximize_tied(state, row, pseudo, everything)
            continue
        for component in range(n_components):
            if not (everything or state[at(shares + component)] > LEAST_SHARE):
                continue
            if general is None or kind == FULL:
                safe &= _maximize_full(state, row, component, pseudo)
            elif kind < DIAGONAL:
                _maximize_other(state, row, component, pseudo)
            else:
                _maximize_separate(state, row, component, pseudo)
    for component in range(n_components):
        if tied or everything or state[at(shares + component)] > LEAST_SHARE:
            _normalize(state, component)
    return safe


@compiled
def _maximize_other(state: Array, row: int, component: int, pseudo: float) -> None:
    if int(state[row + KIND]) == CATEGORICAL:
        _maximize_category(state, row, component, pseudo)
    else:
        _maximize_mean(state, row, component, pseudo)


@compiled
def _retention(state: Array, n_events: float, total_weight: float, weight: float) -> float:
    """The schedules' `retention`."""
    schedule = int(state[SCHEDULE])
    if schedule == HARMONIC or state[STATE_WEIGHT] <= 0.0:
        return 1.0
    step = n_events / state[BATCH_SIZE]
    size = state[ALPHA] if schedule == CONSTANT_STEP else (step + state[OFFSET]) ** -state[ALPHA]
    return min(1.0, max(0.0, (total_weight / (step * size) - weight) / state[STATE_WEIGHT]))


@compiled
def _measure_span(state: Array) -> None:
    """Set how far, in log-density, a component may lie behind the best one and still share in an event."""
    weights, pseudo = int(state[WEIGHTS]), state[PRIOR_WEIGHT] / state[SCALE]
    total = 0.0
    for component in range(int(state[N_COMPONENTS])):
        total += state[at(weights + component)] + pseudo
    state[SPAN] = NEGLIGIBLE_LOG_SHARE + math.log(total / pseudo)


@compiled
def _harden(state: Array, log_prob: float) -> float:
    """Give the event to its most responsible component; return the log-density of both together."""
    shares, winner = int(state[SHARES]), int(state[WINNER])
    joint = log_prob + math.log(state[at(shares + winner)])
    for component in range(int(state[N_COMPONENTS])):
        state[at(shares + component)] = 1.0 if component == winner else 0.0
    return joint


@entry
def step(state: Array, weight: float, gaps: Any, general: Any) -> float:
    """Learn from the event in the state, and return its log-density before.

    Parameters
    ----------
    state
        The vector, with the event in its place.
    weight
        Weight of the event; where it is 0 or less the event is only scored.
    gaps, general
        None, or any number: whether values may be missing, and whether there are factors other than Gaussians
        with full covariances. Where they are None, the code for them is not even compiled.

    Returns
    -------
    log_prob
        NaN when a value is out of range or missing unexpectedly, the scale has become too small, or the covariance
        of the observed fields could not be factorized: nothing was learned then. Infinity when that of an M-step
        could not: the statistics are then right, the parameters are not.

    """
    if not _usable(state, gaps):
        return np.nan
    log_prob = _expect(state, gaps, general)
    if weight <= 0.0 or math.isnan(log_prob):
        return log_prob
    # For the caller, who is told of a failed M-step instead.
    state[LOG_PROB] = log_prob
    told = log_prob
    if state[HARD] != 0.0:
        told = _harden(state, log_prob)
    n_events, total_weight = state[N_EVENTS] + 1.0, state[TOTAL_WEIGHT] + weight
    retention = _retention(state, n_events, total_weight, weight)
    scale = state[SCALE] * retention
    if scale < SMALLEST_SCALE:
        return np.nan
    state[SCALE] = scale
    _absorb(state, weight / scale, gaps, general)
    whole_batch = math.floor(n_events / state[BATCH_SIZE]) > math.floor(state[N_EVENTS] / state[BATCH_SIZE])
    state[STATE_WEIGHT] = retention * state[STATE_WEIGHT] + weight
    state[LOG_LIKELIHOOD] = retention * state[LOG_LIKELIHOOD] + weight * told
    state[N_EVENTS], state[TOTAL_WEIGHT] = n_events, total_weight
    state[N_UPDATES] += 1.0
    safe = _maximize(state, whole_batch, general)
    if whole_batch:
        _measure_span(state)
    return log_prob if safe else np.inf


def entry_point(function: Any, signature: tuple[Any, ...]) -> Callable[..., float]:
    """Return a function as compiled for these types."""
    try:
        function.compile(signature)
    except OSError:
        # It is compiled by now, only keeping it on disk has failed.
        if signature not in map(tuple, function.signatures):
            raise
    (found,) = (one for one in function.signatures if tuple(one) == signature)
    compiled_function: Callable[..., float] = function.overloads[found].entry_point
    return compiled_function


@cache
def compiled_step(gaps: bool, general: bool) -> Callable[..., float]:
    """Return `step`, compiled or loaded from disk, for the last two arguments None or 0.

    Arguments are not looked at again: finding out their types takes longer than scoring an event.
    """
    flags = (types.float64 if flag else types.none for flag in (gaps, general))
    return entry_point(step, (VECTOR, types.float64, *flags))
