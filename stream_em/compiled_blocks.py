"""Compiled steps on a block of events: the same packed state, mini-batch by mini-batch.

For Gaussian factors without missing values. A mini-batch costs what its arithmetic costs: two matrix products
around a softmax, then a merge and an M-step, in one call and without holding Python's lock.
"""

# mypy: disable-error-code="no-any-return"

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from llvmlite.binding import get_host_cpu_features
from numba import types

from stream_em.blas import MOST_UNSHARED_PRODUCTS
from stream_em.compiled import (
    BATCH_SIZE,
    CONSTANT,
    FACTOR,
    FULL,
    HEADER,
    KIND,
    LN2_HIGH,
    LN2_LOW,
    LOCATION,
    LOG_LIKELIHOOD,
    MEAN,
    N_COMPONENTS,
    N_EVENTS,
    N_FACTORS,
    N_UPDATES,
    POOLED_MEAN,
    POOLED_SCATTER,
    POOLED_WEIGHT,
    PRECISION,
    PRIOR_WEIGHT,
    ROOT,
    ROW,
    SCALE,
    SCATTER,
    SHARES,
    SIZE,
    SMALLEST_SCALE,
    SPREAD,
    STATE_WEIGHT,
    TOTAL_WEIGHT,
    VECTOR,
    WEIGHT,
    WEIGHTS,
    WORK,
    _maximize,
    _measure_span,
    _retention,
    at,
    compiled,
    compiled_in_order,
    compiled_step,
    entry,
    entry_point,
    step,
    take_logarithm,
)
from stream_em.families.gaussian import LARGEST_SQUARED_OFFSET
from stream_em.numerics import (
    EPSILON,
    LARGEST_LOG_DENSITY,
    LARGEST_VALUE,
    LOG_RESPONSIBILITY_FLOOR,
    SMALLEST_WEIGHT,
    UNPACKED_PRODUCTS,
    Array,
)

MATRIX = types.Array(types.float64, 2, "C")

# Events taken through features, softmax and sums at once: no more than these, fewer where they have many features, so
# that they stay in the core's caches, or else more than `UNPACKED_PRODUCTS`, but not so few that the coefficients are
# read for next to nothing.
CHUNK, LEAST_CHUNK, CHUNK_FEATURES = 504, 128, 300_000

# Doubles in a line of the cache.
CACHE_LINE = 8

# Up to so many coefficients, matrices are too small for OpenBLAS, which packs what it multiplies, to be faster. Small
# ones it does not pack where vectors are those of AVX-512, and is never slower there.
_features = get_host_cpu_features()
MOST_COEFFICIENTS = 0 if _features.get("avx512f") else 2_600 if _features.get("avx2") else 600

LOG2_E = 1.4426950408889634
# Adding 1.5 * 2^52 leaves no bits for a fraction: the sum is rounded to a whole number, in its lowest bits.
ROUNDING_SHIFT = 6755399441055744.0


@compiled_in_order
def _exponentiate(values: Array, scratch: Array) -> None:
    """Replace values <= 0 by their exponentials, to the last digit and without a call for each.

    exp(v) = 2^k exp(r) with |r| <= log(2) / 2, where the Taylor series to the 13th power is exact to rounding.
    """
    for i in range(len(values)):
        value = max(values[i], LOG_RESPONSIBILITY_FLOOR)
        shifted = value * LOG2_E + ROUNDING_SHIFT
        k = shifted - ROUNDING_SHIFT
        r = (value - k * LN2_HIGH) - k * LN2_LOW
        series = 1.6059043836821613e-10
        series = series * r + 2.08767569878681e-09
        series = series * r + 2.505210838544172e-08
        series = series * r + 2.755731922398589e-07
        series = series * r + 2.7557319223985893e-06
        series = series * r + 2.48015873015873e-05
        series = series * r + 1.984126984126984e-04
        series = series * r + 1.3888888888888889e-03
        series = series * r + 8.333333333333333e-03
        series = series * r + 4.1666666666666664e-02
        series = series * r + 1.6666666666666666e-01
        series = series * r + 0.5
        values[i] = (series * r * r + r) + 1.0
        scratch[i] = shifted
    bits, exponents = values.view(np.int64), scratch.view(np.int64)
    for i in range(len(values)):
        bits[i] += exponents[i] << 52


@compiled
def _precision(state: Array, row: int, component: int, inverse: int, precision: int) -> None:
    """Write the inverse of a covariance from its Cholesky factor, by way of the factor's inverse."""
    size = int(state[row + SIZE])
    factor = int(state[row + FACTOR]) + component * size * size
    root = int(state[row + ROOT]) + component * size
    for i in range(size):
        own, scale = inverse + i * size, state[at(root + i)]
        for j in range(i):
            state[at(own + j)] = 0.0
        # Row by row, so that the innermost loops run along the memory.
        for m in range(i):
            coefficient, other = state[at(factor + i * size + m)], inverse + m * size
            for j in range(m + 1):
                state[at(own + j)] -= coefficient * state[at(other + j)]
        for j in range(i):
            state[at(own + j)] *= scale
        state[at(own + i)] = scale
    for i in range(size):
        for j in range(i + 1):
            state[at(precision + i * size + j)] = 0.0
    for m in range(size):
        own = inverse + m * size
        for i in range(m + 1):
            coefficient, target = state[at(own + i)], precision + i * size
            for j in range(i + 1):
                state[at(target + j)] += coefficient * state[at(own + j)]
    for i in range(size):
        for j in range(i):
            state[at(precision + j * size + i)] = state[at(precision + i * size + j)]


@compiled
def _full_coefficients(state: Array, row: int, component: int, theta: Array, start: int) -> float:
    """Write the coefficients of products and fields about the pooled mean; return the constant.

    NaN where the expanded square would lose digits: the component is far away, or its fields nearly collinear.
    """
    size = int(state[row + SIZE])
    inverse = int(state[WORK]) + 3 * size
    precision = inverse + size * size
    _precision(state, row, component, inverse, precision)
    location, center = int(state[row + LOCATION]) + component * size, int(state[row + POOLED_MEAN])
    spread = int(state[row + SPREAD]) + component * size * size
    limit = LARGEST_SQUARED_OFFSET / size
    constant, distance, place = state[at(int(state[row + CONSTANT]) + component)], 0.0, start
    products = size * (size + 1) // 2
    for i in range(size):
        diagonal = state[at(precision + i * size + i)]
        offset = state[at(location + i)] - state[at(center + i)]
        distance += offset * offset * diagonal
        if diagonal * state[at(spread + i * size + i)] > limit:
            return np.nan
        linear = 0.0
        for j in range(size):
            other = state[at(location + j)] - state[at(center + j)]
            linear += state[at(precision + i * size + j)] * other
        theta[component, start + products + i] = linear
        constant -= 0.5 * offset * linear
        theta[component, place] = -0.5 * diagonal
        for j in range(i + 1, size):
            theta[component, place + j - i] = -state[at(precision + i * size + j)]
        place += size - i
    return constant if distance <= limit else np.nan


@compiled
def _separate_coefficients(state: Array, row: int, component: int, theta: Array, start: int) -> float:
    size = int(state[row + SIZE])
    location, center = int(state[row + LOCATION]) + component * size, int(state[row + POOLED_MEAN])
    precision, constants = int(state[row + PRECISION]) + component * size, int(state[row + CONSTANT]) + component * size
    constant, distance = 0.0, 0.0
    # Loops that write one array each are vectorised, since few places have to be told apart.
    for i in range(size):
        theta[component, at(start + i)] = -0.5 * state[at(precision + i)]
    for i in range(size):
        offset = state[at(location + i)] - state[at(center + i)]
        linear = offset * state[at(precision + i)]
        theta[component, at(start + size + i)] = linear
        constant += state[at(constants + i)]
        distance += offset * linear
    return constant - 0.5 * distance if distance <= LARGEST_SQUARED_OFFSET else np.nan


@compiled
def _coefficients(state: Array, theta: Array) -> bool:
    """Write the coefficients of the log-joint in the features; return whether they keep enough digits."""
    n_components, weights = int(state[N_COMPONENTS]), int(state[WEIGHTS])
    pseudo, everything = state[PRIOR_WEIGHT] / state[SCALE], 0.0
    for component in range(n_components):
        everything += state[at(weights + component)] + pseudo
    for component in range(n_components):
        constant, start = math.log((state[at(weights + component)] + pseudo) / everything), 0
        for index in range(int(state[N_FACTORS])):
            row = HEADER + index * ROW
            size = int(state[row + SIZE])
            if int(state[row + KIND]) == FULL:
                constant += _full_coefficients(state, row, component, theta, start)
                start += size * (size + 3) // 2
            else:
                constant += _separate_coefficients(state, row, component, theta, start)
                start += 2 * size
        if math.isnan(constant):
            return False
        theta[component, start] = constant
    return True


@compiled
def _aligned(size: int) -> Array:
    """Memory that begins with a cache line: vectors that lie across two of them take a quarter longer."""
    memory = np.empty(size + CACHE_LINE)
    skipped = -(memory.ctypes.data // memory.itemsize) % CACHE_LINE
    return memory[skipped : skipped + size]


@compiled
def _write_features(left: Any, right: Any, center: Array, values: Array, first: int, features: Array) -> None:
    """Write the features of some events, see `sum_features`."""
    n_features, n_events = features.shape
    for row in range(n_features):
        if right[row] < 0:
            source, target = values[left[row], first : first + n_events], features[row]
            middle = center[left[row]]
            for event in range(n_events):
                target[event] = source[event] - middle
    for row in range(n_features):
        if right[row] >= 0:
            one, other, target = features[left[row]], features[right[row]], features[row]
            for event in range(n_events):
                target[event] = one[event] * other[event]


@compiled
def _respond(shares: Array, log_prob: Array, scratch: Array) -> None:
    """Turn log-joints (K, B) into responsibilities in place, and write the log-sum-exp (B,)."""
    n_components, n_events = shares.shape
    largest, total = scratch[0], scratch[1]
    n_within = 0
    for component in range(n_components):
        row = shares[component]
        for event in range(n_events):
            n_within += 1 if abs(row[event]) <= -LOG_RESPONSIBILITY_FLOOR else 0
    # Within these limits no exponential is subnormal or too large, so that nothing need be taken from the exponents.
    shifted = n_within < n_components * n_events
    for event in range(n_events):
        largest[event] = shares[0, event] if shifted else 0.0
        total[event] = 0.0
    if shifted:
        for component in range(1, n_components):
            row = shares[component]
            for event in range(n_events):
                largest[event] = max(largest[event], row[event])
    for component in range(n_components):
        row = shares[component]
        if shifted:
            for event in range(n_events):
                row[event] -= largest[event]
        _exponentiate(row, scratch[2])
        for event in range(n_events):
            total[event] += row[event]
    for event in range(n_events):
        log_prob[event] = total[event]
        total[event] = 1.0 / total[event]
    take_logarithm(log_prob)
    for event in range(n_events):
        log_prob[event] += largest[event]
    for component in range(n_components):
        row = shares[component]
        for event in range(n_events):
            row[event] *= total[event]


@compiled
def _find_winners(shares: Array, scratch: Array, winners: Array) -> None:
    """Write the position (B,) of the largest responsibility of each event, the first of equals."""
    n_components, n_events = shares.shape
    largest = scratch[0]
    for event in range(n_events):
        largest[event] = shares[0, event]
        winners[event] = 0
    for component in range(1, n_components):
        row = shares[component]
        # Without a branch, which would be mispredicted often.
        for event in range(n_events):
            winners[event] = component if row[event] > largest[event] else winners[event]
            largest[event] = max(largest[event], row[event])


@compiled
def _add_up(state: Array, sums: Array, totals: Array) -> None:
    """Write the sums of fields and of squares (2, D) over all components, in the order of the factors."""
    n_components = len(sums)
    start, first = 0, 0
    for index in range(int(state[N_FACTORS])):
        row = HEADER + index * ROW
        size, full = int(state[row + SIZE]), int(state[row + KIND]) == FULL
        linear = start + (size * (size + 1) // 2 if full else size)
        for i in range(size):
            totals[0, at(first + i)] = 0.0
            totals[1, at(first + i)] = 0.0
        for component in range(n_components):
            for i in range(size):
                totals[0, at(first + i)] += sums[component, at(linear + i)]
            if full:
                square = start
                for i in range(size):
                    totals[1, at(first + i)] += sums[component, at(square)]
                    square += size - i
            else:
                for i in range(size):
                    totals[1, at(first + i)] += sums[component, at(start + i)]
        start, first = linear + size, first + size


@compiled
def _drowns(first: float, second: float, scatter: float, pooled: float, weights: tuple[float, float, float]) -> int:
    """1 where a component's variance is lost in the rounding of its offset, 0 where it is not."""
    weight, inverse, inverse_of_all = weights
    squared = (first * inverse) ** 2
    # A few events hardly vary, but what they join does.
    variance = (weight * max(second * inverse - squared, 0.0) + scatter) * inverse_of_all
    # Against the whole range of the block a variance of 0 is as good as one of 1e-15.
    return 1 if EPSILON * squared > 1e-9 * variance + 1e-15 * pooled else 0


@compiled
def _keeps_digits(state: Array, sums: Array, totals: Array, scale: float) -> bool:
    """Whether all values were plain numbers, and no variance drowned in the rounding of its offset.

    The sums and the offsets are about the pooled mean. `scale` is what the statistics so far will count.
    """
    n_components, last = sums.shape[0], sums.shape[1] - 1
    total = SMALLEST_WEIGHT
    for component in range(n_components):
        total += sums[component, last]
    n_drowned, start, first = 0, 0, 0
    pooled = np.empty(totals.shape[1])
    for i in range(len(pooled)):
        # Nor is it below where a value was missing.
        n_drowned += 0 if totals[1, i] < LARGEST_VALUE else 1
        pooled[i] = max(totals[1, i] / total - (totals[0, i] / total) ** 2, 0.0)
    if n_drowned:
        return False
    for index in range(int(state[N_FACTORS])):
        row = HEADER + index * ROW
        size, full = int(state[row + SIZE]), int(state[row + KIND]) == FULL
        linear = start + (size * (size + 1) // 2 if full else size)
        for component in range(n_components):
            weight = sums[component, last]
            if weight <= SMALLEST_WEIGHT:
                continue
            scatter = int(state[row + SCATTER]) + component * (size * size if full else size)
            weights = weight, 1.0 / weight, 1.0 / (weight + scale * state[at(int(state[WEIGHTS]) + component)])
            if full:
                square = start
                for i in range(size):
                    own = scale * state[at(scatter + i * size + i)]
                    n_drowned += _drowns(
                        sums[component, at(linear + i)],
                        sums[component, at(square)],
                        own,
                        pooled[at(first + i)],
                        weights,
                    )
                    square += size - i
            else:
                for i in range(size):
                    own = scale * state[at(scatter + i)]
                    n_drowned += _drowns(
                        sums[component, at(linear + i)],
                        sums[component, at(start + i)],
                        own,
                        pooled[at(first + i)],
                        weights,
                    )
        start, first = linear + size, first + size
    return n_drowned == 0


@compiled
def _absorb_sums(state: Array, sums: Array, totals: Array) -> None:
    """Merge sums of features about the pooled mean into statistics, then into pooled statistics."""
    n_components, last = sums.shape[0], sums.shape[1] - 1
    weights, start, first = int(state[WEIGHTS]), 0, 0
    inverse_scale, all_weight = 1.0 / state[SCALE], 0.0
    for component in range(n_components):
        all_weight += sums[component, last]
    for index in range(int(state[N_FACTORS])):
        row = HEADER + index * ROW
        size, full = int(state[row + SIZE]), int(state[row + KIND]) == FULL
        for component in range(n_components):
            if sums[component, last] <= 0.0:
                continue
            if full:
                _absorb_full(state, row, component, sums, start, inverse_scale)
            else:
                _absorb_separate(state, row, component, sums, start, inverse_scale)
        pooled_weight, center = int(state[row + POOLED_WEIGHT]), int(state[row + POOLED_MEAN])
        pooled_scatter, new = int(state[row + POOLED_SCATTER]), all_weight * inverse_scale
        for i in range(size):
            old = state[at(pooled_weight + i)]
            # The old pooled mean is the origin of the features.
            offset = totals[0, at(first + i)] / all_weight
            within = max(totals[1, at(first + i)] - offset * totals[0, at(first + i)], 0.0)
            share = new / (old + new)
            state[at(pooled_scatter + i)] += within * inverse_scale + old * share * offset * offset
            state[at(center + i)] += share * offset
            state[at(pooled_weight + i)] = old + new
        start, first = start + (size * (size + 3) // 2 if full else 2 * size), first + size
    for component in range(n_components):
        state[at(weights + component)] += sums[component, last] * inverse_scale


@compiled
def _absorb_full(state: Array, row: int, component: int, sums: Array, start: int, inverse_scale: float) -> None:
    size = int(state[row + SIZE])
    linear = start + size * (size + 1) // 2
    center, delta = int(state[row + POOLED_MEAN]), int(state[WORK])
    mean, scatter = int(state[row + MEAN]) + component * size, int(state[row + SCATTER]) + component * size * size
    weight, old = sums[component, sums.shape[1] - 1], state[at(int(state[WEIGHTS]) + component)]
    new = weight * inverse_scale
    share, inverse = new / (old + new), 1.0 / weight
    for i in range(size):
        offset = sums[component, at(linear + i)] * inverse
        state[at(delta + i)] = state[at(center + i)] + offset - state[at(mean + i)]
    square = start
    for i in range(size):
        offset = sums[component, at(linear + i)] * inverse
        for j in range(i, size):
            within = sums[component, at(square)] - offset * sums[component, at(linear + j)]
            if i == j:
                within = max(within, 0.0)
            between = old * share * state[at(delta + i)] * state[at(delta + j)]
            state[at(scatter + j * size + i)] += within * inverse_scale + between
            square += 1
    for i in range(size):
        state[at(mean + i)] += share * state[at(delta + i)]


@compiled
def _absorb_separate(state: Array, row: int, component: int, sums: Array, start: int, inverse_scale: float) -> None:
    size = int(state[row + SIZE])
    linear, center = start + size, int(state[row + POOLED_MEAN])
    mean, own_weight = int(state[row + MEAN]) + component * size, int(state[row + WEIGHT]) + component * size
    scatter = int(state[row + SCATTER]) + component * size
    weight = sums[component, sums.shape[1] - 1]
    new, inverse = weight * inverse_scale, 1.0 / weight
    # A component's weight in a field is less than its own where values were missing in the past.
    for i in range(size):
        offset, old = sums[component, at(linear + i)] * inverse, state[at(own_weight + i)]
        within = max(sums[component, at(start + i)] - offset * sums[component, at(linear + i)], 0.0)
        delta = state[at(center + i)] + offset - state[at(mean + i)]
        state[at(scatter + i)] += within * inverse_scale + old * new / (old + new) * delta * delta
    for i in range(size):
        offset, old = sums[component, at(linear + i)] * inverse, state[at(own_weight + i)]
        delta = state[at(center + i)] + offset - state[at(mean + i)]
        state[at(mean + i)] += new / (old + new) * delta
        state[at(own_weight + i)] = old + new


@compiled
def _project(theta: Array, features: Array, log_joint: Array) -> None:
    """Write theta[:, :-1] @ features + theta[:, -1:], a tile of components and features at a time."""
    n_components, n_features = theta.shape[0], len(features)
    for component in range(n_components):
        row, constant = log_joint[component], theta[component, n_features]
        for event in range(len(row)):
            row[event] = constant
    for first in range(0, n_components - 3, 4):
        for row in range(0, n_features - 3, 4):
            _add_four_by_four(theta, features, log_joint, first, row)
    for first in range(n_components // 4 * 4, n_components - 1, 2):
        for row in range(0, n_features - 3, 4):
            _add_two_by_four(theta, features, log_joint, first, row)
    for component in range(n_components):
        # Of the features, those that no tile holds.
        in_tiles = n_features // 4 * 4 if component < n_components // 2 * 2 else 0
        for row in range(in_tiles, n_features):
            target, source, coefficient = log_joint[component], features[row], theta[component, row]
            for event in range(len(target)):
                target[event] += coefficient * source[event]


@compiled
def _four_from(array: Array, first: int) -> tuple[Any, Any, Any, Any]:
    return array[first], array[first + 1], array[first + 2], array[first + 3]


@compiled
def _add_four_by_four(theta: Array, features: Array, log_joint: Array, first: int, row: int) -> None:
    one, two, three, four = _four_from(log_joint, first)
    x0, x1, x2, x3 = _four_from(features, row)
    a0, a1, a2, a3 = _four_from(theta[first], row)
    b0, b1, b2, b3 = _four_from(theta[first + 1], row)
    c0, c1, c2, c3 = _four_from(theta[first + 2], row)
    d0, d1, d2, d3 = _four_from(theta[first + 3], row)
    for event in range(len(one)):
        y0, y1, y2, y3 = x0[event], x1[event], x2[event], x3[event]
        one[event] = one[event] + a0 * y0 + a1 * y1 + a2 * y2 + a3 * y3
        two[event] = two[event] + b0 * y0 + b1 * y1 + b2 * y2 + b3 * y3
        three[event] = three[event] + c0 * y0 + c1 * y1 + c2 * y2 + c3 * y3
        four[event] = four[event] + d0 * y0 + d1 * y1 + d2 * y2 + d3 * y3


@compiled
def _add_two_by_four(theta: Array, features: Array, log_joint: Array, first: int, row: int) -> None:
    one, two = log_joint[first], log_joint[first + 1]
    x0, x1, x2, x3 = _four_from(features, row)
    a0, a1, a2, a3 = _four_from(theta[first], row)
    b0, b1, b2, b3 = _four_from(theta[first + 1], row)
    for event in range(len(one)):
        y0, y1, y2, y3 = x0[event], x1[event], x2[event], x3[event]
        one[event] = one[event] + a0 * y0 + a1 * y1 + a2 * y2 + a3 * y3
        two[event] = two[event] + b0 * y0 + b1 * y1 + b2 * y2 + b3 * y3


@compiled
def _accumulate(shares: Array, features: Array, sums: Array) -> None:
    """Add shares @ features.T to all but the last column of the sums, a tile of both at a time."""
    n_components, n_features = len(shares), len(features)
    for row in range(0, n_features, 2):
        for first in range(0, n_components - 3, 4):
            _sum_four_by_two(shares, features, sums, first, row)
        for first in range(n_components // 4 * 4, n_components, 2):
            _sum_two_by_two(shares, features, sums, first, row)


@compiled
def _sum_four_by_two(shares: Array, features: Array, sums: Array, first: int, row: int) -> None:
    one, two, three, four = _four_from(shares, first)
    # The last of an odd number is computed twice, but added once.
    next_row = min(row + 1, len(features) - 1)
    x0, x1 = features[row], features[next_row]
    a0, a1, b0, b1, c0, c1, d0, d1 = 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0
    for event in range(len(one)):
        y0, y1 = x0[event], x1[event]
        a0 += one[event] * y0
        a1 += one[event] * y1
        b0 += two[event] * y0
        b1 += two[event] * y1
        c0 += three[event] * y0
        c1 += three[event] * y1
        d0 += four[event] * y0
        d1 += four[event] * y1
    sums[first, row] += a0
    sums[first + 1, row] += b0
    sums[first + 2, row] += c0
    sums[first + 3, row] += d0
    if next_row > row:
        sums[first, next_row] += a1
        sums[first + 1, next_row] += b1
        sums[first + 2, next_row] += c1
        sums[first + 3, next_row] += d1


@compiled
def _sum_two_by_two(shares: Array, features: Array, sums: Array, first: int, row: int) -> None:
    second, next_row = min(first + 1, len(shares) - 1), min(row + 1, len(features) - 1)
    one, two, x0, x1 = shares[first], shares[second], features[row], features[next_row]
    a0, a1, b0, b1 = 0.0, 0.0, 0.0, 0.0
    for event in range(len(one)):
        y0, y1 = x0[event], x1[event]
        a0 += one[event] * y0
        a1 += one[event] * y1
        b0 += two[event] * y0
        b1 += two[event] * y1
    # The last of an odd number is computed twice, but added once.
    sums[first, row] += a0
    if next_row > row:
        sums[first, next_row] += a1
    if second > first:
        sums[second, row] += b0
        if next_row > row:
            sums[second, next_row] += b1


@entry
def sum_features(
    theta: Array,
    table: Any,
    center: Array,
    values: Array,
    weight: Array,
    start: int,
    stop: int,
    log_prob: Array,
    responsibilities: Array,
    winners: Any,
    sums: Array,
) -> float:
    """E-step of the events from `start` to `stop`; return their weighted log-likelihood, NaN where one is impossible.

    Parameters
    ----------
    theta
        (K, Q + 1) coefficients of the features in the log-joint.
    table
        (2, Q) what each feature is, left and right: where the right is -1, the field that the left names, less its
        center; otherwise the product of the features that both name.
    center
        (D,) origin of the features.
    values
        (D, B), nothing missing.
    weight
        (B,) weights, or empty when all are 1.
    log_prob, responsibilities, winners
        (B,), (K, B) and (B,), written, unless they are empty.
    sums
        (K, Q + 1) sums of the features, weighted by weight and responsibility, and of 1; added to.

    """
    left, right = table[0], table[1]
    n_components, n_features = theta.shape[0], theta.shape[1] - 1
    small = n_components * n_features <= MOST_COEFFICIENTS
    coefficients = theta[:, : 0 if small else n_features].copy()
    chunk = max(LEAST_CHUNK, min(CHUNK, CHUNK_FEATURES // n_features))
    unpacked = UNPACKED_PRODUCTS // (n_components * n_features)
    if unpacked >= LEAST_CHUNK:
        chunk = min(chunk, unpacked)
    # Whole cache lines, and an odd number of them, so that rows do not compete for the same places.
    chunk = CACHE_LINE * (chunk // CACHE_LINE - 1 | 1)
    size = min(chunk, stop - start)
    memory, part = _aligned((n_features + n_components + 4) * size), np.empty((n_features, n_components))
    log_likelihood, n_impossible = 0.0, 0
    for first in range(start, stop, chunk):
        length = min(chunk, stop - first)
        a, b = n_features * length, (n_features + n_components) * length
        features = memory[:a].reshape(n_features, length)
        # Where responsibilities will not be weighted, they can be computed where they are wanted.
        in_place = responsibilities.shape[1] == length and not len(weight)
        shares = responsibilities if in_place else memory[a:b].reshape(n_components, length)
        scratch = memory[b : b + 3 * length].reshape(3, length)
        _write_features(left, right, center, values, first, features)
        if small:
            _project(theta, features, shares)
        else:
            np.dot(coefficients, features, shares)
            for component in range(n_components):
                constant = theta[component, n_features]
                for event in range(length):
                    shares[component, event] += constant
        told = log_prob[first : first + length] if len(log_prob) else memory[b + 3 * length : b + 4 * length]
        _respond(shares, told, scratch)
        for event in range(length):
            n_impossible += 0 if told[event] >= -LARGEST_LOG_DENSITY else 1
        if len(winners):
            _find_winners(shares, scratch, winners[first : first + length])
        if responsibilities.shape[1] and not in_place:
            for component in range(n_components):
                for event in range(length):
                    responsibilities[component, first + event] = shares[component, event]
        if len(weight):
            for event in range(length):
                log_likelihood += weight[first + event] * told[event]
            for component in range(n_components):
                for event in range(length):
                    shares[component, event] *= weight[first + event]
        else:
            for event in range(length):
                log_likelihood += told[event]
        for component in range(n_components):
            total = 0.0
            for event in range(length):
                total += shares[component, event]
            sums[component, n_features] += total
        if small:
            _accumulate(shares, features, sums)
        else:
            np.dot(features, shares.T, part)
            for component in range(n_components):
                for row in range(n_features):
                    sums[component, row] += part[row, component]
    # An impossible event may be hidden in the sum by its small weight.
    return log_likelihood if n_impossible == 0 else np.nan


@compiled
def _pooled_mean(state: Array, left: Any, center: Array) -> None:
    """Write the pooled mean (D,) of the fields."""
    start = 0
    for index in range(int(state[N_FACTORS])):
        row = HEADER + index * ROW
        size = int(state[row + SIZE])
        linear = start + (size * (size + 1) // 2 if int(state[row + KIND]) == FULL else size)
        for i in range(size):
            center[left[linear + i]] = state[at(int(state[row + POOLED_MEAN]) + i)]
        start = linear + size


@entry
def step_block(state: Array, table: Any, events: Any, weight: Array, answers: Array, general: Any) -> float:
    """Learn from a mini-batch, and write what was thought of each event before.

    Each array costs a call as much as dozens of events do.

    Parameters
    ----------
    state
        The vector.
    table, weight
        As `sum_features` has them; its center is the pooled mean.
    events
        (D, B), in any layout.
    answers
        (K + 2, B) responsibilities, log-densities and the bits of the winners' positions, written, or empty.
    general
        None, or any number: whether there are covariances other than full ones.

    Returns
    -------
    log_likelihood
        NaN when the block asks for more care than this code takes, or holds what is no plain number: nothing was
        learned then. Infinity when a covariance could not be factorized: the statistics are then right, the parameters
        are not.

    """
    n_components, n_columns, n_events = int(state[N_COMPONENTS]), table.shape[1] + 1, events.shape[1]
    theta, sums = np.empty((n_components, n_columns)), np.zeros((n_components, n_columns))
    if not _coefficients(state, theta):
        return np.nan
    center = np.empty(events.shape[0])
    _pooled_mean(state, table[0], center)
    log_prob, winners = answers[n_components], answers[n_components + 1].view(np.int64)
    log_likelihood = sum_features(
        theta, table, center, events, weight, 0, n_events, log_prob, answers[:n_components], winners, sums
    )
    n_told, total_weight = float(n_events), float(n_events)
    if len(weight):
        n_told, total_weight = 0.0, 0.0
        for event in range(n_events):
            n_told += 1.0 if weight[event] > 0.0 else 0.0
            total_weight += weight[event]
    seen, all_weight = state[N_EVENTS] + n_told, state[TOTAL_WEIGHT] + total_weight
    retention = _retention(state, seen, all_weight, total_weight)
    scale = state[SCALE] * retention
    if not (scale >= SMALLEST_SCALE and total_weight > 0.0 and log_likelihood >= -LARGEST_LOG_DENSITY):
        return np.nan
    totals = np.empty((2, len(center)))
    _add_up(state, sums, totals)
    if not _keeps_digits(state, sums, totals, scale):
        return np.nan
    state[SCALE] = scale
    _absorb_sums(state, sums, totals)
    whole_batch = math.floor(seen / state[BATCH_SIZE]) > math.floor(state[N_EVENTS] / state[BATCH_SIZE])
    state[STATE_WEIGHT] = retention * state[STATE_WEIGHT] + total_weight
    state[LOG_LIKELIHOOD] = retention * state[LOG_LIKELIHOOD] + log_likelihood
    state[N_EVENTS], state[TOTAL_WEIGHT] = seen, all_weight
    state[N_UPDATES] += 1.0
    for component in range(n_components):
        state[at(int(state[SHARES]) + component)] = sums[component, n_columns - 1] / total_weight
    safe = _maximize(state, whole_batch, general)
    if whole_batch:
        _measure_span(state)
    return log_likelihood if safe else np.inf


def shared_from(n_coefficients: int) -> float:
    """From how many events on BLAS, left alone, would share the products of a step with them out to threads."""
    most_unshared = MOST_UNSHARED_PRODUCTS // n_coefficients
    return most_unshared + 1 if n_coefficients > MOST_COEFFICIENTS and most_unshared < CHUNK else math.inf


INDICES = types.Array(types.int64, 1, "C")
TABLE = types.Array(types.int64, 2, "C")


@cache
def compiled_step_block(general: bool) -> Callable[..., float]:
    """Return `step_block`, compiled or loaded from disk, for the last argument None or 0."""
    events = types.Array(types.float64, 2, "A")
    flag = types.float64 if general else types.none
    return entry_point(step_block, (VECTOR, TABLE, events, VECTOR, MATRIX, flag))


@cache
def compiled_sum_features() -> Callable[..., float]:
    """Return `sum_features`, compiled or loaded from disk."""
    events, answers = (VECTOR, MATRIX, VECTOR), (VECTOR, MATRIX, INDICES)
    return entry_point(sum_features, (MATRIX, TABLE, *events, types.int64, types.int64, *answers, MATRIX))


def compile_all() -> None:
    """Compile every step and keep it on disk, for the processes that will load it; where it is there, load it.

    Raises
    ------
    OSError
        When there is no place to keep it.

    """
    compiled_sum_features()
    for general in (False, True):
        compiled_step_block(general)
        for gaps in (False, True):
            compiled_step(gaps, general)
    for function in (sum_features, step_block, step):
        place = function.stats.cache_path
        if place is None or not any(Path(place).glob(f"*.{function.__name__}-*.nbc")):
            raise OSError(f"compiled code cannot be kept in {place or 'any folder'}: set NUMBA_CACHE_DIR to one")
