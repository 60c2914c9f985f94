"""The SwiGLU experts of one device as five fused TPU kernels (Pallas), for rows grouped by expert.

    forward   hidden = silu(rows @ gate) * (rows @ up) * weight          gate, up and hidden from one pass over the rows
              out = hidden @ down
    backward  d_hidden = d_out @ down^T, and from it d_gate, d_up, hidden and d_weight while it is still on the chip
              d_down = hidden^T @ d_out;  d_gate_up = rows^T @ [d_gate, d_up];  d_rows = [d_gate, d_up] @ gate_up^T

Nothing of width 2F or F passes through memory only to be multiplied elementwise, and no router weight multiplies a
[Q, D] array. Between the passes gate and up are kept, named "moe_hidden" for rematerialisation policies.

Work is cut into visits: a visit is one tile of TILE rows and one expert that has rows in it. A tile inside one group is one
large matmul; where groups meet, only the sub-tiles of SUB rows that the expert has rows in are multiplied, and its rows
masked in. The number of visits depends on the routing, not on the number of experts. Rows past the last group are never
written: whoever reads them must not use them. Off TPU the kernels run interpreted, for the parity tests.

Shapes: Q rows, D width, F expert hidden width, E experts of the device; gate_up [E, D, 2F], down [E, F, D].
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

TILE, SUB = 512, 128  # rows
VMEM_LIMIT = 60 * 2**20  # bytes; every supported chip has 64 MB a core
WEIGHT_BLOCK = 2**22  # bytes of a weight block on the chip, at most; there are up to four


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def expert_mlp(
    rows: Float[Array, "Q D"], gate_up: Float[Array, "E D two_F"], down: Float[Array, "E F D"],
    weights: Float[Array, "Q"], group_sizes: Int[Array, "E"], interpret: bool,
) -> Float[Array, "Q D"]:
    """weights[q] * expert(rows[q]) for every row. Q must be a multiple of TILE, or of 8 when interpreted."""
    return _forward(rows, gate_up, down, weights, group_sizes, interpret)[0]


def _forward(rows, gate_up, down, weights, group_sizes, interpret):
    visits = plan_visits(group_sizes, rows.shape[0])
    gate_up_rows, hidden = swiglu_matmul(rows, gate_up, weights, visits, interpret)
    gate_up_rows = checkpoint_name(gate_up_rows, "moe_hidden")
    out = matmul(hidden[None], down, visits, interpret)
    return out, (rows, gate_up, down, weights, group_sizes, gate_up_rows)


def _backward(interpret, saved, d_out):
    rows, gate_up, down, weights, group_sizes, gate_up_rows = saved
    visits = plan_visits(group_sizes, rows.shape[0])
    d_gate_up_rows, hidden, d_weights = swiglu_matmul_adjoint(d_out, down, gate_up_rows, weights, visits, interpret)
    every_visit = plan_visits(group_sizes, rows.shape[0], empty_groups=True)
    d_down = weight_gradient(hidden, d_out[None], every_visit, interpret)
    d_gate_up = weight_gradient(rows, d_gate_up_rows, every_visit, interpret)
    # The weights' gradients first: their reductions over the mesh have longer to run, and three [Q, D] arrays are freed.
    d_gate_up_rows, d_gate_up, d_down = lax.optimization_barrier((d_gate_up_rows, d_gate_up, d_down))
    d_rows = matmul(d_gate_up_rows, gate_up, visits, interpret, transpose=True)
    return d_rows, d_gate_up, d_down, d_weights, None


expert_mlp.defvjp(_forward, _backward)


# ---- visits ---------------------------------------------------------------------------------------------------------


class Visits(NamedTuple):
    """V = tiles + E - 1 visits at most, of which the first `number` take place, in the order of the rows."""

    expert: Int[Array, "V"]
    tile: Int[Array, "V"]
    start: Int[Array, "E"]  # first row of each group
    end: Int[Array, "E"]
    number: Int[Array, "1"]


def plan_visits(group_sizes: Int[Array, "E"], num_rows: int, empty_groups: bool = False) -> Visits:
    """`empty_groups`: visit them too (weight gradients have to be zeroed)."""
    tile = row_tile(num_rows)
    end = jnp.cumsum(group_sizes)
    start = end - group_sizes
    first = jnp.minimum(start // tile, num_rows // tile - 1)
    count = jnp.where(group_sizes > 0, (end - 1) // tile - first + 1, int(empty_groups))
    last = jnp.cumsum(count)
    visit = jnp.arange(num_rows // tile + group_sizes.shape[0] - 1 + (group_sizes.shape[0] if empty_groups else 0))
    expert = jnp.minimum(jnp.sum(visit[:, None] >= last, axis=1, dtype=jnp.int32), group_sizes.shape[0] - 1)
    of = (expert[:, None] == jnp.arange(group_sizes.shape[0])).astype(jnp.int32)
    tiles = jnp.minimum(visit + jnp.sum(of * (first - (last - count)), axis=1), num_rows // tile - 1)
    as_int = (a.astype(jnp.int32) for a in (expert, tiles, start, end, last[-1:]))
    return Visits(*as_int)


def row_tile(num_rows: int) -> int:
    return math.gcd(num_rows, TILE)


def _for_each_part(visits, tile, axis, body):
    """Calls `body(rows, inside)` for the parts of a tile that the expert of visit `program_id(axis)` has rows in: the whole
    tile with `inside` None, or its sub-tiles with a mask [rows, 1]."""
    at = pl.program_id(axis)
    expert, first = visits.expert[at], visits.tile[at] * tile
    start, end = visits.start[expert], visits.end[expert]
    whole = (start <= first) & (first + tile <= end)
    pl.when(whole)(lambda: body(pl.ds(0, tile), None))
    sub = min(SUB, tile)
    for offset in range(0, tile, sub):
        low = first + offset

        def part(offset=offset, low=low):
            row = low + lax.broadcasted_iota(jnp.int32, (sub, 1), 0)
            body(pl.ds(offset, sub), (row >= start) & (row < end))

        pl.when(jnp.logical_not(whole) & (start < low + sub) & (low < end))(part)


def _merge(ref, rows, value, inside):
    """Writes the rows of this expert into a tile that others write into as well."""
    value = value.astype(ref.dtype)
    ref[rows, :] = value if inside is None else jnp.where(inside, value, ref[rows, :])


# ---- kernels --------------------------------------------------------------------------------------------------------


def matmul(rows: Array, weights: Array, visits: Visits, interpret: bool, transpose: bool = False) -> Array:
    """rows [parts, Q, F] times the expert's weights [E, parts * F, D] -> [Q, D], or [E, D, parts * F] when transposed; the
    rows' columns lie in parts."""
    parts, Q, contract = rows.shape
    width = weights.shape[1 if transpose else 2]
    tile, column = row_tile(Q), column_block(width, parts * contract * weights.dtype.itemsize)

    def kernel(*refs):
        visit, rows_ref, weights_ref, out_ref = Visits(*refs[:5]), *refs[5:]

        def part(r, inside):
            products = []
            for p in range(parts):
                at = pl.ds(p * contract, contract)
                block = weights_ref[:, at] if transpose else weights_ref[at, :]
                products.append(_dot(rows_ref[p, r, :], block, 1, 1 if transpose else 0))
            _merge(out_ref, r, sum(products[1:], products[0]), inside)

        _for_each_part(visit, tile, 1, part)

    block = (None, column, parts * contract) if transpose else (None, parts * contract, column)
    return _call(
        kernel, visits, (width // column,), interpret, flops=2 * Q * parts * contract * width,
        inputs=[(rows, (parts, tile, contract), lambda n, e, t: (0, t, 0)),
                (weights, block, (lambda n, e, t: (e, n, 0)) if transpose else (lambda n, e, t: (e, 0, n)))],
        outputs=[((Q, width), rows.dtype, (tile, column), lambda n, e, t: (t, n))])[0]


def swiglu_matmul(rows: Array, gate_up: Array, weights: Array, visits: Visits, interpret: bool) -> Sequence[Array]:
    """(rows @ gate and rows @ up [2, Q, F], silu(gate) * up * weights [Q, F])."""
    Q, D = rows.shape
    F = gate_up.shape[2] // 2
    tile, column = row_tile(Q), column_block(F, D * gate_up.dtype.itemsize)
    blocks = F // column

    def kernel(*refs):
        visit, rows_ref, gate_ref, up_ref, weight_ref, gate_up_out, hidden_out = Visits(*refs[:5]), *refs[5:]

        def part(r, inside):
            gate, up = (_dot(rows_ref[r, :], w[...], 1, 0) for w in (gate_ref, up_ref))
            _merge(gate_up_out.at[0], r, gate, inside)
            _merge(gate_up_out.at[1], r, up, inside)
            _merge(hidden_out, r, gate * jax.nn.sigmoid(gate) * up * weight_ref[r, :], inside)

        _for_each_part(visit, tile, 1, part)

    return _call(
        kernel, visits, (blocks,), interpret, flops=4 * Q * D * F,
        inputs=[(rows, (tile, D), lambda n, e, t: (t, 0)),
                (gate_up, (None, D, column), lambda n, e, t: (e, 0, n)),
                (gate_up, (None, D, column), lambda n, e, t: (e, 0, blocks + n)),
                (weights[:, None], (tile, 1), lambda n, e, t: (t, 0))],
        outputs=[((2, Q, F), rows.dtype, (2, tile, column), lambda n, e, t: (0, t, n)),
                 ((Q, F), rows.dtype, (tile, column), lambda n, e, t: (t, n))])


def swiglu_matmul_adjoint(d_out: Array, down: Array, gate_up_rows: Array, weights: Array, visits: Visits,
                          interpret: bool) -> Sequence[Array]:
    """From d_out [Q, D]: (d_gate_up_rows [2, Q, F], hidden [Q, F] once more, d_weights [Q])."""
    Q, D = d_out.shape
    F = down.shape[1]
    tile, column = row_tile(Q), column_block(F, D * down.dtype.itemsize)

    def kernel(*refs):
        visit, d_out_ref, down_ref, gate_up_ref, weight_ref, d_gate_up, hidden, d_weight = Visits(*refs[:5]), *refs[5:]

        def part(r, inside):
            d_hidden = _dot(d_out_ref[r, :], down_ref[...], 1, 1)
            gate, up = (gate_up_ref[p, r, :].astype(jnp.float32) for p in (0, 1))
            weight, sigmoid = weight_ref[r, :], jax.nn.sigmoid(gate)
            silu = gate * sigmoid
            d_product = d_hidden * weight
            _merge(d_gate_up.at[0], r, d_product * up * (sigmoid + silu * (1 - sigmoid)), inside)
            _merge(d_gate_up.at[1], r, d_product * silu, inside)
            _merge(hidden, r, silu * up * weight, inside)
            _merge(d_weight, r, jnp.sum(d_hidden * silu * up, axis=1, keepdims=True), inside)

        _for_each_part(visit, tile, 1, part)

    by_row = lambda n, e, t: (t, n)
    d_gate_up, hidden, d_weights = _call(
        kernel, visits, (F // column,), interpret, flops=2 * Q * D * F,
        inputs=[(d_out, (tile, D), lambda n, e, t: (t, 0)),
                (down, (None, column, D), lambda n, e, t: (e, n, 0)),
                (gate_up_rows, (2, tile, column), lambda n, e, t: (0, t, n)),
                (weights[:, None], (tile, 1), lambda n, e, t: (t, 0))],
        outputs=[((2, Q, F), d_out.dtype, (2, tile, column), lambda n, e, t: (0, t, n)),
                 ((Q, F), d_out.dtype, (tile, column), by_row),
                 ((F // column, Q, 1), jnp.float32, (None, tile, 1), lambda n, e, t: (n, t, 0))])
    return d_gate_up, hidden, functools.reduce(jnp.add, d_weights)[:, 0]  # a sum over the axis takes more than twice as long


def weight_gradient(rows: Array, d_out: Array, visits: Visits, interpret: bool) -> Array:
    """rows [Q, D]^T times d_out [parts, Q, F] within each group -> [E, D, parts * F]. `visits` include the empty groups."""
    (Q, D), (parts, _, width) = rows.shape, d_out.shape
    E = visits.start.shape[0]
    tile, column = row_tile(Q), column_block(width, D * rows.dtype.itemsize)
    blocks = width // column

    def kernel(*refs):
        visit, rows_ref, d_out_ref, out_ref, total = Visits(*refs[:5]), *refs[5:]
        at, number = pl.program_id(1), pl.num_programs(1)
        expert = visit.expert[at]
        first = (at == 0) | (visit.expert[jnp.maximum(at - 1, 0)] != expert)
        last = (at == number - 1) | (visit.expert[jnp.minimum(at + 1, number - 1)] != expert)

        @pl.when(first)
        def _():
            total[...] = jnp.zeros_like(total)

        def part(r, inside):
            a, b = rows_ref[r, :], d_out_ref[r, :]
            if inside is not None:  # both: a row of nobody may hold anything, NaN included
                a, b = (jnp.where(inside, x, jnp.zeros_like(x)) for x in (a, b))
            total[...] += _dot(a, b, 0, 0)

        _for_each_part(visit, tile, 1, part)

        @pl.when(last)
        def _():
            out_ref[...] = total[...].astype(out_ref.dtype)

    return _call(
        kernel, visits, (parts * blocks,), interpret, flops=2 * Q * D * parts * width,
        inputs=[(rows, (tile, D), lambda n, e, t: (t, 0)),
                (d_out, (None, tile, column), lambda n, e, t: (lax.div(n, blocks), t, lax.rem(n, blocks)))],
        outputs=[((E, D, parts * width), rows.dtype, (None, D, column), lambda n, e, t: (e, 0, n))],
        scratch=[pltpu.VMEM((D, column), jnp.float32)])[0]


def column_block(width: int, column_bytes: int) -> int:
    """Columns of one weight block: within WEIGHT_BLOCK, and at least two blocks where possible, one for each core of a
    chip with two."""
    limit = min(width // 2, WEIGHT_BLOCK // column_bytes)
    return next((c for c in range(limit // 128 * 128, 0, -128) if width % c == 0), width)


def _dot(a, b, a_dim: int, b_dim: int):
    return lax.dot_general(a, b, (((a_dim,), (b_dim,)), ((), ())), preferred_element_type=jnp.float32)


def _call(kernel, visits: Visits, columns: tuple[int], interpret: bool, *, flops, inputs, outputs, scratch=()):
    """Runs `kernel` for every (column block, visit); index maps are functions of (column block, expert, tile)."""

    def index_map(of):
        return lambda n, v, expert, tile, *_: of(n, expert[v], tile[v])

    moved = sum(a.size * a.dtype.itemsize for a in {id(a): a for a, _, _ in inputs}.values())
    moved += sum(jnp.dtype(dtype).itemsize * math.prod(shape) for shape, dtype, _, _ in outputs)
    return pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=5, grid=(*columns, visits.number[0]),
            in_specs=[pl.BlockSpec(block, index_map(of)) for _, block, of in inputs],
            out_specs=[pl.BlockSpec(block, index_map(of)) for _, _, block, of in outputs],
            scratch_shapes=list(scratch)),
        out_shape=[jax.ShapeDtypeStruct(shape, dtype) for shape, dtype, _, _ in outputs],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=VMEM_LIMIT),
        cost_estimate=pl.CostEstimate(flops=flops, bytes_accessed=moved, transcendentals=0),
        interpret=interpret, name=kernel.__qualname__.split(".")[0],
    )(*visits, *(a for a, _, _ in inputs))
