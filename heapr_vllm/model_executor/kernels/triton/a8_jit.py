# SPDX-License-Identifier: Apache-2.0
"""Triton kernels that multiply activations in 8 bits by experts in 8 bits. jit functions only.

Blocks, tables, `w13` with its scales and `w2` are those of `jit.py`; codes of activations have the weights' type, int8
or float8e4nv. Tokens are rounded in groups of BLOCK_K inputs, `x` [T, H] with float32 `x_scale` [T, H / BLOCK_K], and
silu(gate) * up by slab of 64 neurons, where it is made: `hidden` [rows, >= widest] with float32 `hidden_scale`
[rows, >= widest / 64]. `w2_scale` is one per slab and output, bfloat16 [rows / 64, H], and by channel as there. So all
products of a step have the same factors, and sums of int8 are exact until then; those of float8e4nv are at most 128
inputs long before float32 takes them over, since tensor cores keep fewer bits.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from heapr_vllm.model_executor.kernels.triton.jit import SIZES, _block, _tile

LARGEST_INT8 = tl.constexpr(127.0)
LARGEST_E4M3 = tl.constexpr(448.0)
SMALLEST = tl.constexpr(1e-30)  # magnitude below which factors would overflow
ROUNDER = tl.constexpr(1.5 * 2.0**23)  # float32 has no fractions up there: a sum's lowest bits are the nearest integer


@triton.jit
def _rounded(values, dtype: tl.constexpr):
    """(codes of float32 `values` [n, K], scales [n]). Where a value is no number, the scale is none.

    The largest magnitude is that of bits as integers, which have NaN above infinity.
    """
    largest = tl.max(tl.abs(values).to(tl.int32, bitcast=True), 1).to(tl.float32, bitcast=True)
    limit = LARGEST_INT8 if dtype == tl.int8 else LARGEST_E4M3
    steps = values * (limit / tl.maximum(largest, SMALLEST))[:, None]
    codes = (steps + ROUNDER).to(tl.int32, bitcast=True).to(tl.int8) if dtype == tl.int8 else steps.to(dtype)
    return codes, largest / limit


@triton.jit
def _product(a, b):
    """a . b in float32. Low blocks of float8e4nv are the second operand: Triton has wgmma from 64 rows of the first."""
    if a.dtype == tl.int8:
        product = tl.dot(a, b, out_dtype=tl.int32).to(tl.float32)
    elif a.shape[0] < 64:
        product = tl.dot(b.T, a.T).T
    else:
        product = tl.dot(a, b)
    return product


@triton.jit
def _scale(scales, number, STRIDE: tl.constexpr, ARE_SHARED: tl.constexpr):
    """Scales of columns for the products of a step; a placeholder where all steps share them."""
    return tl.full((1,), 1.0, tl.float32) if ARE_SHARED else tl.load(scales + number * STRIDE).to(tl.float32)


@triton.jit
def round_rows_kernel(
    x, stride_xm, codes, scales,
    H: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    """codes[t] * scales[t] is about x[t], in groups of BLOCK_K. Grid: (T, ceil(H / BLOCK_N)).

    `x` [T, H], `codes` [T, H], `scales` float32 [T, H / BLOCK_K].
    """
    if CHAINED:
        gdc_wait()
        gdc_launch_dependents()
    NUM_GROUPS: tl.constexpr = H // BLOCK_K
    token = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1) * (BLOCK_N // BLOCK_K) + tl.arange(0, BLOCK_N // BLOCK_K)
    inside = group < NUM_GROUPS
    offs = group[:, None] * BLOCK_K + tl.arange(0, BLOCK_K)[None, :]
    values = tl.load(x + token * stride_xm + offs, mask=inside[:, None], other=0.0).to(tl.float32)
    rounded, scale = _rounded(values, codes.dtype.element_ty)
    tl.store(codes + token * H + offs, rounded, mask=inside[:, None])
    tl.store(scales + token * NUM_GROUPS + group, scale, mask=inside)


@triton.jit(do_not_specialize=SIZES)
def a8_up_kernel(
    x, x_scale,
    w13, w13_scale, table, hidden, hidden_scale,
    stride_hm, route_ids, block_slots, num_rows,
    num_routes, num_experts, num_m_blocks, num_n_tiles,
    H: tl.constexpr, TOP_K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
    ONE_ROUTE: tl.constexpr, GROUP: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    """hidden[row, n] * hidden_scale[row, n // 64] is about silu(gate_n . x) * (up_n . x), rows in block order.

    Grid as of `ragged_up_kernel`. BLOCK_N is 64, a slab; BLOCK_K a divisor of H and of GROUP, the inputs of a neuron
    that share a scale.
    """
    BY_CHANNEL: tl.constexpr = GROUP == H
    pid_m, pid_n = _tile(num_m_blocks, num_n_tiles, GROUP_M)
    if CHAINED:
        gdc_wait()
        gdc_launch_dependents()
    routes, rows, _, _, slab, slabs = _block(
        route_ids, block_slots, num_rows, table, pid_m, num_routes, num_experts, BLOCK_M, ONE_ROUTE
    )
    if pid_n >= slabs:
        return
    slab += pid_n
    valid = routes < num_routes
    tokens = (routes // TOP_K).to(tl.int64)
    offs_k = tl.arange(0, BLOCK_K)
    offs_2n = tl.arange(0, 2 * BLOCK_N)
    x_ptrs = x + tokens[:, None] * H + offs_k[None, :]
    x_scales = x_scale + tokens * (H // BLOCK_K)
    w_ptrs = w13 + slab * (128 * H) + offs_2n[None, :] * H + offs_k[:, None]
    w_scales = w13_scale + slab * (H // GROUP * 128) + offs_2n
    both = tl.zeros((BLOCK_M, 2 * BLOCK_N), dtype=tl.float32)
    of_x = tl.load(x_scales, mask=valid, other=0.0)
    of_w = _scale(w_scales, 0, 128, BY_CHANNEL)
    for k in range(0, H, BLOCK_K):
        following = tl.minimum(k + BLOCK_K, H - BLOCK_K)
        next_of_x = tl.load(x_scales + following // BLOCK_K, mask=valid, other=0.0)
        next_of_w = _scale(w_scales, following // GROUP, 128, BY_CHANNEL)
        a = tl.load(x_ptrs + k, mask=valid[:, None], other=0.0)
        both += _product(a, tl.load(w_ptrs + k)) * of_x[:, None] * of_w[None, :]
        of_x = next_of_x
        of_w = next_of_w
    if BY_CHANNEL:
        both *= tl.load(w_scales)[None, :]
    gate, up = tl.split(both.reshape(BLOCK_M, BLOCK_N, 2))
    codes, scale = _rounded(gate / (1 + tl.exp(-gate)) * up, hidden.dtype.element_ty)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    tl.store(hidden + rows[:, None] * stride_hm + offs_n[None, :], codes, mask=valid[:, None])
    tl.store(hidden_scale + rows * (stride_hm // 64) + pid_n, scale, mask=valid)


@triton.jit(do_not_specialize=SIZES)
def a8_down_kernel(
    hidden, hidden_scale, stride_hm,
    w2, w2_scale, table, routed,
    route_ids, block_slots, num_rows,
    num_routes, num_experts, num_m_blocks, num_n_tiles,
    H: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
    ONE_ROUTE: tl.constexpr, BY_CHANNEL: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    """routed[route] = down_e(hidden of that route) [num_routes, H], over the expert's own width.

    Grid as of `ragged_down_kernel`, `hidden` as written by `a8_up_kernel`. H must be a multiple of BLOCK_N, and BLOCK_K
    is 64, a slab. BY_CHANNEL: outputs have one scale for all slabs.
    """
    pid_m, pid_n = _tile(num_m_blocks, num_n_tiles, GROUP_M)
    routes, rows, _, slot, slab, slabs = _block(
        route_ids, block_slots, num_rows, table, pid_m, num_routes, num_experts, BLOCK_M, ONE_ROUTE
    )
    if CHAINED:
        gdc_wait()
        gdc_launch_dependents()
    if slabs == 0:
        return
    valid = routes < num_routes
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    hidden_ptrs = hidden + rows[:, None] * stride_hm + offs_k[None, :]
    h_scales = hidden_scale + rows * (stride_hm // 64)
    w2_ptrs = w2 + slab * (64 * H) + offs_n[None, :] * 64 + offs_k[:, None]
    w_scales = w2_scale + slab * H + offs_n
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    of_h = tl.load(h_scales, mask=valid, other=0.0)
    of_w = _scale(w_scales, 0, H, BY_CHANNEL)
    for number in range(0, slabs):
        following = tl.minimum(number + 1, slabs - 1)
        next_of_h = tl.load(h_scales + following, mask=valid, other=0.0)
        next_of_w = _scale(w_scales, following, H, BY_CHANNEL)
        a = tl.load(hidden_ptrs + number * 64, mask=valid[:, None], other=0.0)
        total += _product(a, tl.load(w2_ptrs + number * (64 * H))) * of_h[:, None] * of_w[None, :]
        of_h = next_of_h
        of_w = next_of_w
    if BY_CHANNEL:
        total *= tl.load(w2_scale + slot.to(tl.int64) * H + offs_n)[None, :]
    tl.store(
        routed + routes.to(tl.int64)[:, None] * H + offs_n[None, :],
        total.to(routed.dtype.element_ty),
        mask=valid[:, None],
    )
