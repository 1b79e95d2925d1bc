"""The search for block scales, compiled: which scales, minima and codes lose least of sixteen runs of weights.

Works on panels. A panel is sixteen runs (sub-blocks of a K-quant, or whole small blocks) side by side: number `i` of
run `lane` lies at `i * LANES + lane`, so that one SIMD lane serves one run and nothing is ever summed across lanes.
Every loop over lanes therefore reads like the code for a single run, and the order of every sum is fixed: the result
is the same on every machine and for any number of threads.

`quantize.py` explains the method and loads this module on first use, since it imports numba. Knows no block layout.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import njit

from .dequantize import IQ4_VALUES

F32 = np.float32
LANES = 16
ROWS = 16  # rows of a panel that are unrolled; every run length is a multiple
AFFINE_ROUNDS = 2  # of refitting a super-block and moving levels; the second gains 0.3 %
SYMMETRIC_ROUNDS = 1  # a second would gain 0.05 %

HALF_MAX = F32(65504)
HALF_NORMAL = F32(2**-14)
HALF_STEP = F32(2**-24)  # the smallest half above zero
CEILING = F32(1e12)  # beyond what any block can hold, and its square times any importance is still finite
INFINITY = F32(np.inf)  # in place of a divisor of zero: divides anything to zero, and needs no branch
FLAT = F32(1e-30)  # a range that counts as none: its reciprocal would overflow
ALIKE = F32(1e-6)  # a determinant below this share of its terms is a rounding error
# A better fit must be better by this share, else rounding errors would choose between equals. Candidates come with the
# finest scale first: of two equal fits the finer one leaves the super-block more room.
MARGIN = F32(1e-5)

# Where trial grids end, in steps inside (+) or outside (-) of the run's own range.
AFFINE_SHIFTS = np.array([1.2, 0.4, -0.2, -0.8], dtype=F32)
SYMMETRIC_SHIFTS = np.array([1.6, 0.8, 0.4, 0.0, -0.4, -0.8], dtype=F32)
TABLE_UNIT = F32(8)  # what counts as a step among the uneven ones of the table
TABLE_STEPS = np.diff(IQ4_VALUES)
TABLE_MIDDLES = (IQ4_VALUES[1:] + IQ4_VALUES[:-1]) / 2

# No fast math: without it the bytes are the same on every machine.
_inner = njit(nogil=True, error_model="numpy", forceinline=True, no_cpython_wrapper=True, no_cfunc_wrapper=True)
_entry = njit(nogil=True, error_model="numpy", cache=True)


class Panel(NamedTuple):
    """Sixteen runs and, for each lane, what the steps of the search hand to one another."""

    x: np.ndarray  # [n * LANES] weights
    w: np.ndarray  # [n * LANES] importance
    codes: np.ndarray  # uint8 [n * LANES]
    low: np.ndarray  # [LANES], as all below: smallest weight, at most 0 where minima may not be negative
    high: np.ndarray
    sum_w: np.ndarray
    sum_wx: np.ndarray
    scale: np.ndarray  # fitted: x ~ scale * code - minimum
    minimum: np.ndarray
    fit: np.ndarray  # error of that fit less sum w x^2
    inverse: np.ndarray  # of the scale on trial
    offset: np.ndarray  # the minimum on trial
    q: np.ndarray  # sums of w q, w q^2, w q x over the codes q of a trial
    qq: np.ndarray
    qx: np.ndarray
    d: np.ndarray  # scale of the super-block, a half
    dmin: np.ndarray
    level: np.ndarray  # its integer factor
    min_level: np.ndarray
    start: np.ndarray  # levels a search begins from
    min_start: np.ndarray
    error: np.ndarray  # of the levels on trial, and the least so far
    least: np.ndarray


def new_panel(n: int) -> Panel:
    """An empty panel of runs of `n` weights, of equal importance until told otherwise."""
    x, w, codes = np.zeros(n * LANES, F32), np.ones(n * LANES, F32), np.zeros(n * LANES, np.uint8)
    return Panel(x, w, codes, *np.zeros((len(Panel._fields) - 3, LANES), F32))


@_inner
def _load(p, x, w, first, n):
    """Transpose runs `first` ... of `x` [n_runs, n] into the panel; `w` [runs a row, n] repeats row after row."""
    for lane in range(min(LANES, x.shape[0] - first)):  # lanes past the end keep what they held: nothing reads them
        for i in range(n):
            p.x[i * LANES + lane] = x[first + lane, i]
    if w.shape[0] > 0:
        for lane in range(LANES):
            run = (first + lane) % w.shape[0]
            for i in range(n):
                p.w[i * LANES + lane] = w[run, i]


@_inner
def _summarise(p, n, floor):
    for lane in range(LANES):
        p.low[lane], p.high[lane] = -floor, -CEILING
        p.sum_w[lane] = p.sum_wx[lane] = F32(0)
    for i in range(n):
        xs, ws = p.x[i * LANES : (i + 1) * LANES], p.w[i * LANES : (i + 1) * LANES]
        for lane in range(LANES):
            x = min(max(xs[lane], -CEILING), CEILING)
            xs[lane] = x
            p.low[lane] = min(p.low[lane], x)
            p.high[lane] = max(p.high[lane], x)
            p.sum_w[lane] += ws[lane]
            p.sum_wx[lane] += ws[lane] * x


@_inner
def _reciprocal(x):
    return F32(1) / (x if x != F32(0) else INFINITY)


@_inner
def _to_half(x):
    """The nearest half-precision number, but never infinite, and zero for zero only."""
    size = abs(x)
    if size < HALF_NORMAL:
        rounded = max(np.rint(size / HALF_STEP) * HALF_STEP, HALF_STEP) if size > F32(0) else F32(0)
    else:
        bits = F32(min(size, HALF_MAX)).view(np.int32)
        rounded = np.int32((bits + 0xFFF + (bits >> 13 & 1)) & ~0x1FFF).view(np.float32)
    return -rounded if x < F32(0) else rounded


@_inner
def _nearest(x):
    """The nearest value of the IQ4 table: one comparison a gap, since lanes cannot branch."""
    value = IQ4_VALUES[0]
    for gap in range(len(TABLE_STEPS)):
        value += TABLE_STEPS[gap] if x > TABLE_MIDDLES[gap] else F32(0)
    return value


@_inner
def _table_moments(p, n):
    for lane in range(LANES):
        p.qq[lane] = p.qx[lane] = F32(0)
    for i in range(n):
        xs, ws = p.x[i * LANES : (i + 1) * LANES], p.w[i * LANES : (i + 1) * LANES]
        for lane in range(LANES):
            value = _nearest(xs[lane] * p.inverse[lane])
            weighted = ws[lane] * value
            p.qq[lane] += weighted * value
            p.qx[lane] += weighted * xs[lane]


@_inner
def _table_errors(p, n):
    for lane in range(LANES):
        p.error[lane] = F32(0)
        p.inverse[lane] = _reciprocal(p.scale[lane])
    for i in range(n):
        xs, ws = p.x[i * LANES : (i + 1) * LANES], p.w[i * LANES : (i + 1) * LANES]
        for lane in range(LANES):
            miss = xs[lane] - p.scale[lane] * _nearest(xs[lane] * p.inverse[lane])
            p.error[lane] += ws[lane] * miss * miss


@_inner
def _table_codes(p, n):
    for i in range(n):
        xs, codes = p.x[i * LANES : (i + 1) * LANES], p.codes[i * LANES : (i + 1) * LANES]
        for lane in range(LANES):
            x = xs[lane] * p.inverse[lane]
            code = np.uint8(0)
            for gap in range(len(TABLE_STEPS)):
                code += np.uint8(x > TABLE_MIDDLES[gap])
            codes[lane] = code


@_inner
def _moments(p, n, bottom, top, table):
    """Round to codes q = (x + offset) * inverse within bottom ... top, and sum w q, w q^2, w q x."""
    if table:
        _table_moments(p, n)
        return
    for lane in range(LANES):
        p.q[lane] = p.qq[lane] = p.qx[lane] = F32(0)
    for first in range(0, n, ROWS):
        xs, ws = p.x[first * LANES : (first + ROWS) * LANES], p.w[first * LANES : (first + ROWS) * LANES]
        for lane in range(LANES):
            q, qq, qx = p.q[lane], p.qq[lane], p.qx[lane]
            for i in range(ROWS):
                x = xs[i * LANES + lane]
                code = np.rint(min(max((x + p.offset[lane]) * p.inverse[lane], bottom), top))
                weighted = ws[i * LANES + lane] * code
                q += weighted
                qq += weighted * code
                qx += weighted * x
            p.q[lane], p.qq[lane], p.qx[lane] = q, qq, qx


@_inner
def _errors(p, n, bottom, top, table):
    """Sum w (x - decoded)^2 for the levels on trial, each weight rounded to its nearest code."""
    if table:
        _table_errors(p, n)
        return
    for lane in range(LANES):
        p.error[lane] = F32(0)
    for first in range(0, n, ROWS):
        xs, ws = p.x[first * LANES : (first + ROWS) * LANES], p.w[first * LANES : (first + ROWS) * LANES]
        for lane in range(LANES):
            scale, error = p.scale[lane], p.error[lane]
            inverse = _reciprocal(scale)
            for i in range(ROWS):
                x = xs[i * LANES + lane] + p.offset[lane]
                miss = x - scale * np.rint(min(max(x * inverse, bottom), top))
                error += ws[i * LANES + lane] * miss * miss
            p.error[lane] = error


@_inner
def _fit_affine(p, n, top, floor):
    """Scale and minimum of each run: least squares over the codes that each trial range rounds to."""
    for lane in range(LANES):
        p.scale[lane], p.minimum[lane] = F32(0), -p.low[lane]
        p.fit[lane] = p.minimum[lane] * (p.minimum[lane] * p.sum_w[lane] + F32(2) * p.sum_wx[lane])
    for inside_low in AFFINE_SHIFTS:
        for inside_high in AFFINE_SHIFTS:
            steps = top + inside_low + inside_high
            for lane in range(LANES):
                extent = p.high[lane] - p.low[lane]
                p.inverse[lane] = steps / (extent if extent > FLAT else INFINITY)
                p.offset[lane] = max(-p.low[lane] - inside_low / steps * extent, floor)
            _moments(p, n, F32(0), top, False)
            for lane in range(LANES):
                scale, minimum, fit = _solve_affine(p, lane, floor)
                old_scale, old_minimum, old_fit = p.scale[lane], p.minimum[lane], p.fit[lane]
                better = fit < old_fit - MARGIN * abs(old_fit)
                p.scale[lane] = scale if better else old_scale
                p.minimum[lane] = minimum if better else old_minimum
                p.fit[lane] = fit if better else old_fit


@_inner
def _solve_affine(p, lane, floor):
    """Minimise sum w (x - scale q + minimum)^2 with minimum >= floor; returns both and the sum less sum w x^2."""
    sum_w, sum_wx, q, qq, qx = p.sum_w[lane], p.sum_wx[lane], p.q[lane], p.qq[lane], p.qx[lane]
    det = sum_w * qq - q * q
    alike = det < ALIKE * sum_w * qq
    inverse = _reciprocal(det)
    minimum = (q * qx - qq * sum_wx) * inverse
    bounded = alike or minimum < floor
    minimum = floor if bounded else minimum  # -inf if the codes are alike and there is no floor: the fit is then NaN
    scale = (qx + floor * q) * _reciprocal(qq) if bounded else (sum_w * qx - q * sum_wx) * inverse
    fit = scale * (scale * qq - F32(2) * qx) + minimum * (minimum * sum_w + F32(2) * (sum_wx - scale * q))
    return scale, minimum, fit


@_inner
def _fit_symmetric(p, n, bottom, top, table):
    """Scale of each run: least squares over the codes that each trial scale, of either sign, rounds to."""
    unit = TABLE_UNIT if table else F32(1)
    for lane in range(LANES):
        p.scale[lane] = p.fit[lane] = F32(0)
    for inside in SYMMETRIC_SHIFTS:
        for end in (bottom - unit * inside, top + unit * inside):
            for lane in range(LANES):
                largest = p.high[lane] if p.high[lane] > -p.low[lane] else p.low[lane]
                p.inverse[lane] = end / (largest if abs(largest) > FLAT else INFINITY)
            _moments(p, n, bottom, top, table)
            for lane in range(LANES):
                qx, old_scale, old_fit = p.qx[lane], p.scale[lane], p.fit[lane]
                scale = qx * _reciprocal(p.qq[lane])
                fit = -scale * qx
                better = fit < old_fit - MARGIN * abs(old_fit)
                p.scale[lane] = scale if better else old_scale
                p.fit[lane] = fit if better else old_fit


@_inner
def _split(values, group, low, high, d, levels):
    """Values as integer levels low ... high of one half `d` a group, its largest value at an end of the levels."""
    for start in range(0, LANES, group):
        largest = F32(0)
        for lane in range(start, start + group):
            if abs(values[lane]) > abs(largest):
                largest = values[lane]
        exact = largest / (low if low < F32(0) else high)
        if low < high:  # where halves are coarse, round outward: there is no level above the last
            exact += np.copysign(HALF_STEP / F32(2), exact)
        for lane in range(start, start + group):
            d[lane] = _to_half(exact) if largest != F32(0) else F32(0)
    for lane in range(LANES):
        levels[lane] = min(max(np.rint(values[lane] * _reciprocal(d[lane])), low), high)


@_inner
def _use_levels(p):
    for lane in range(LANES):
        p.scale[lane] = p.d[lane] * p.level[lane]
        p.offset[lane] = p.dmin[lane] * p.min_level[lane]
        p.inverse[lane] = _reciprocal(p.scale[lane])


@_inner
def _refit(p, first, stop):
    """The super-block's two scales by least squares, codes and levels kept: normal equations over its runs."""
    aa = am = mm = ax = mx = 0.0
    for lane in range(first, stop):
        level, min_level = np.float64(p.level[lane]), np.float64(p.min_level[lane])
        aa += level * level * p.qq[lane]
        am -= level * min_level * p.q[lane]
        mm += min_level * min_level * p.sum_w[lane]
        ax += level * p.qx[lane]
        mx -= min_level * p.sum_wx[lane]
    det = aa * mm - am * am
    d, dmin = p.d[first], p.dmin[first]
    if det > 1e-5 * aa * mm:
        d, dmin = _to_half(F32((mm * ax - am * mx) / det)), _to_half(F32((aa * mx - am * ax) / det))
    elif aa > 0.0:
        d = _to_half(F32((ax - am * dmin) / aa))
    for lane in range(first, stop):
        p.d[lane], p.dmin[lane] = d, dmin


@_inner
def _try_neighbours(p, n, bottom, top, low, high, affine, table):
    """Move the levels of each run to the best of their neighbours: three, or nine if there are minima."""
    for lane in range(LANES):
        p.start[lane], p.min_start[lane], p.least[lane] = p.level[lane], p.min_level[lane], INFINITY
    for step in (F32(0), F32(-1), F32(1)):
        for min_step in (F32(0), F32(-1), F32(1)):
            if min_step != F32(0) and not affine:
                continue
            for lane in range(LANES):
                p.scale[lane] = p.d[lane] * min(max(p.start[lane] + step, low), high)
                p.offset[lane] = p.dmin[lane] * min(max(p.min_start[lane] + min_step, F32(0)), high)
            _errors(p, n, bottom, top, table)
            for lane in range(LANES):
                if p.error[lane] < p.least[lane]:
                    p.least[lane] = p.error[lane]
                    p.level[lane] = min(max(p.start[lane] + step, low), high)
                    p.min_level[lane] = min(max(p.min_start[lane] + min_step, F32(0)), high)


@_inner
def _codes(p, n, bottom, top, table):
    """Codes of the chosen levels, counted from `bottom`."""
    if table:
        _table_codes(p, n)
        return
    for first in range(0, n, ROWS):
        xs, codes = p.x[first * LANES : (first + ROWS) * LANES], p.codes[first * LANES : (first + ROWS) * LANES]
        for lane in range(LANES):
            offset, inverse = p.offset[lane], p.inverse[lane]
            for i in range(ROWS):
                code = np.rint(min(max((xs[i * LANES + lane] + offset) * inverse, bottom), top))
                codes[i * LANES + lane] = np.uint8(np.int32(code - bottom))


@_inner
def _store(p, n, first, group, codes, levels, min_levels, d, dmin):
    n_present = min(LANES, codes.shape[0] - first)
    for lane in range(n_present):
        levels[first + lane], min_levels[first + lane] = p.level[lane], p.min_level[lane]
        for i in range(n):
            codes[first + lane, i] = p.codes[i * LANES + lane]
    block = first // group
    for start in range(0, n_present, group):
        d[block], dmin[block] = p.d[start], p.dmin[start]
        block += 1


@_entry
def search(p, x, w, grid, codes, levels, min_levels, d, dmin):
    """Encode runs of weights as level * d * code - min_level * dmin.

    x float32 [n_runs, n]; w float32 [runs a row, n], or [0, n] to count all alike; `grid` is a `quantize.Grid`.
    Fills codes uint8 [n_runs, n] (the lowest is 0), levels and min_levels int8 [n_runs], d and dmin float32
    [n_runs / grid.group].
    """
    n, bottom, top, low, high = x.shape[1], F32(grid.bottom), F32(grid.top), F32(grid.low), F32(grid.high)
    rounds = 0 if low == high else AFFINE_ROUNDS if grid.affine else SYMMETRIC_ROUNDS
    for first in range(0, x.shape[0], LANES):
        _load(p, x, w, first, n)
        if grid.affine:
            _summarise(p, n, F32(grid.floor))
            _fit_affine(p, n, top, F32(grid.floor))
        else:
            _summarise(p, n, -INFINITY)
            _fit_symmetric(p, n, bottom, top, grid.table)
        _split(p.scale, grid.group, low, high, p.d, p.level)
        if grid.affine:
            _split(p.minimum, grid.group, F32(0), high, p.dmin, p.min_level)
        for _ in range(rounds):
            _use_levels(p)
            _moments(p, n, bottom, top, grid.table)
            for start in range(0, LANES, grid.group):
                _refit(p, start, start + grid.group)
            _try_neighbours(p, n, bottom, top, low, high, grid.affine, grid.table)
        _use_levels(p)
        _codes(p, n, bottom, top, grid.table)
        _store(p, n, first, grid.group, codes, levels, min_levels, d, dmin)
