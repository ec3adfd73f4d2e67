# SPDX-License-Identifier: Apache-2.0
"""Triton kernels for experts of variable width: two grouped GEMMs and a combine. jit functions only.

Every program reads its expert's slot, and from the table [num_slots, 2] (first row, width) where that expert's neurons
lie; nothing comes from the host but sizes that depend on the token count. Rows ("routes") are token-expert pairs,
numbered token * TOP_K + k. A block is BLOCK_M routes of one expert:

  route_ids    int32 [blocks * BLOCK_M]  route per row, >= num_routes for padding
  block_slots  int32 [blocks]            expert slot per block, num_slots if its expert is not stored here
  num_rows     int32 [1]                 rows in use, a multiple of BLOCK_M

With ONE_ROUTE (decoding) block i is route i alone, in row 0 of the block; then `route_ids` are the routes' expert ids
[T * TOP_K] and `block_slots` is the layer's slot per expert. Slots are numbered widest expert first, so the longest
tiles start first.

Widths are multiples of 64. `w13` [2 * rows, H] has an expert's gate rows, then its up rows; `w2` [rows / 64, H, 64]
has its down_proj as slabs of 64 neurons, so that a (BLOCK_N, 64) tile is one contiguous piece of memory.
"""

import triton
import triton.language as tl

SIZES = ("num_routes", "num_slots", "num_m_blocks", "num_n_tiles")  # compiled once for all values


@triton.jit
def _slot(slots, expert, num_slots):
    """Slot of a global expert id; negative ids are nobody's."""
    return tl.where(expert < 0, num_slots, tl.load(slots + tl.maximum(expert, 0)))


@triton.jit
def _tile(num_m_blocks, num_n_tiles, GROUP_M: tl.constexpr):
    """(m, n) of this program: GROUP_M blocks share an n tile before the next, so weights stay in L2."""
    pid = tl.program_id(0)
    group = pid // (GROUP_M * num_n_tiles)
    first_m = group * GROUP_M
    size = min(num_m_blocks - first_m, GROUP_M)
    inside = pid % (GROUP_M * num_n_tiles)
    return first_m + inside % size, inside // size


@triton.jit(do_not_specialize=SIZES)
def ragged_up_kernel(
    x, stride_xm,
    w13, table, hidden,
    stride_hm, route_ids, block_slots, num_rows,
    num_routes, num_slots, num_m_blocks, num_n_tiles,
    H: tl.constexpr, TOP_K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
    ONE_ROUTE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """hidden[row, n] = silu(gate_n . x) * (up_n . x) for n below the expert's width, rows in block order.

    Grid: (num_m_blocks * num_n_tiles,), num_n_tiles = ceil(widest / BLOCK_N). `x` [T, H]. `hidden`
    [blocks * BLOCK_M (or blocks with ONE_ROUTE), >= widest]. H must be a multiple of BLOCK_K.
    """
    pid_m, pid_n = _tile(num_m_blocks, num_n_tiles, GROUP_M)
    if ONE_ROUTE:
        slot = _slot(block_slots, tl.load(route_ids + pid_m), num_slots)
    else:
        if pid_m * BLOCK_M >= tl.load(num_rows):
            return
        slot = tl.load(block_slots + pid_m)
    if slot >= num_slots:
        return
    row = tl.load(table + 2 * slot).to(tl.int64)
    width = tl.load(table + 2 * slot + 1)
    if pid_n * BLOCK_N >= width:
        return
    offs_m = tl.arange(0, BLOCK_M)
    if ONE_ROUTE:
        routes = tl.where(offs_m == 0, pid_m, num_routes)
        rows = tl.where(offs_m == 0, pid_m, 0).to(tl.int64)
    else:
        routes = tl.load(route_ids + pid_m * BLOCK_M + offs_m)
        rows = (pid_m * BLOCK_M + offs_m).to(tl.int64)
    valid = routes < num_routes
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    neurons = tl.where(offs_n < width, offs_n, 0)
    offs_k = tl.arange(0, BLOCK_K)
    x_ptrs = x + (routes // TOP_K).to(tl.int64)[:, None] * stride_xm + offs_k[None, :]
    gate_ptrs = w13 + (2 * row + neurons)[None, :] * H + offs_k[:, None]
    up_ptrs = gate_ptrs + width.to(tl.int64) * H
    gate = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    up = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for _ in range(0, H, BLOCK_K):
        a = tl.load(x_ptrs, mask=valid[:, None], other=0.0)
        gate = tl.dot(a, tl.load(gate_ptrs), gate, input_precision=PRECISION)
        up = tl.dot(a, tl.load(up_ptrs), up, input_precision=PRECISION)
        x_ptrs += BLOCK_K
        gate_ptrs += BLOCK_K
        up_ptrs += BLOCK_K
    product = gate / (1 + tl.exp(-gate)) * up
    tl.store(hidden + rows[:, None] * stride_hm + offs_n[None, :], product.to(hidden.dtype.element_ty),
             mask=valid[:, None] & (offs_n[None, :] < width))


@triton.jit(do_not_specialize=SIZES)
def ragged_down_kernel(
    hidden, stride_hm,
    w2, table, routed,
    route_ids, block_slots, num_rows,
    num_routes, num_slots, num_m_blocks, num_n_tiles,
    H: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
    ONE_ROUTE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """routed[route] = down_e(hidden of that route) [num_routes, H], over the expert's own width.

    Grid: (num_m_blocks * num_n_tiles,), num_n_tiles = H / BLOCK_N. `hidden` as written by `ragged_up_kernel`. H must be
    a multiple of BLOCK_N, and 64 of BLOCK_K, so that the loop ends exactly at the expert's width.
    """
    pid_m, pid_n = _tile(num_m_blocks, num_n_tiles, GROUP_M)
    if ONE_ROUTE:
        slot = _slot(block_slots, tl.load(route_ids + pid_m), num_slots)
    else:
        if pid_m * BLOCK_M >= tl.load(num_rows):
            return
        slot = tl.load(block_slots + pid_m)
    if slot >= num_slots:
        return
    row = tl.load(table + 2 * slot).to(tl.int64)
    width = tl.load(table + 2 * slot + 1)
    offs_m = tl.arange(0, BLOCK_M)
    if ONE_ROUTE:
        routes = tl.where(offs_m == 0, pid_m, num_routes)
        rows = tl.where(offs_m == 0, pid_m, 0).to(tl.int64)
    else:
        routes = tl.load(route_ids + pid_m * BLOCK_M + offs_m)
        rows = (pid_m * BLOCK_M + offs_m).to(tl.int64)
    valid = routes < num_routes
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    hidden_ptrs = hidden + rows[:, None] * stride_hm + offs_k[None, :]
    w2_ptrs = w2 + row * H + offs_n[None, :] * 64 + offs_k[:, None]
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for k in range(0, width, BLOCK_K):
        a = tl.load(hidden_ptrs + k, mask=valid[:, None], other=0.0)
        b = tl.load(w2_ptrs + (k // 64) * (64 * H) + k % 64)
        total = tl.dot(a, b, total, input_precision=PRECISION)
    tl.store(routed + routes.to(tl.int64)[:, None] * H + offs_n[None, :], total.to(routed.dtype.element_ty),
             mask=valid[:, None])


@triton.jit(do_not_specialize=SIZES)
def combine_kernel(routed, topk_weights, topk_ids, slots, num_slots, output, stride_om, H: tl.constexpr,
                   TOP_K: tl.constexpr, BLOCK_N: tl.constexpr):
    """output[t] = sum over k of topk_weights[t, k] * routed[t, k], fp32 in fixed order, absent experts left out.

    Grid: (T, ceil(H / BLOCK_N)). `routed` [T * TOP_K, H], `topk_weights` float32 and `topk_ids` int32 [T, TOP_K],
    `slots` int32 [experts].
    """
    token = tl.program_id(0).to(tl.int64)
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    total = tl.zeros((BLOCK_N,), dtype=tl.float32)
    for k in tl.static_range(TOP_K):
        route = token * TOP_K + k
        if _slot(slots, tl.load(topk_ids + route), num_slots) < num_slots:
            part = tl.load(routed + route * H + offs_n, mask=offs_n < H, other=0.0)
            total += tl.load(topk_weights + route) * part.to(tl.float32)
    tl.store(output + token * stride_om + offs_n, total.to(output.dtype.element_ty), mask=offs_n < H)
