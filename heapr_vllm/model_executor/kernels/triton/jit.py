# SPDX-License-Identifier: Apache-2.0
"""Triton kernels for experts of variable width: two grouped GEMMs and a combine. jit functions only.

Rows ("routes") are token-expert pairs, numbered token * TOP_K + k. A block is BLOCK_M routes of one expert:

  route_ids    int32 [blocks * BLOCK_M]  route per row, >= num_routes for padding
  block_slots  int32 [blocks]            expert slot per block; a slot or negative for blocks that are not in use
  num_rows     int32 [1]                 rows in use, a multiple of BLOCK_M

With ONE_ROUTE (decoding) block i is route i alone, in row 0 of the block; then `route_ids` are the routes' expert ids
[T * TOP_K], negative for absent ones, and `block_slots` [1 + num_experts] is -1, then every expert's slot or -1.
Nothing comes from the host but sizes that depend on the token count.

Widths are multiples of 64, a slab. `table` int64 [num_experts + 1 + num_slots] says where an expert's neurons lie,
first slab << 32 | number of slabs: by global expert id, then 0 for an absent id, then by slot, widest expert first, so
that the longest tiles start first. One load finds an expert, and all sizes are multiples of 64 to the compiler.

`w13` [2 * rows, H] has gate row and up row of every neuron side by side; `w2` [rows / 64, H, 64] has down_proj as slabs
of 64 neurons, so that a (BLOCK_N, 64) tile is one contiguous piece of memory.

Experts in 8 bits are codes int8, float8e4nv, or uint8 for float8e4nv to be decoded by bits, in the same places. Their
float32 scales per neuron and GROUP of H lie beside them in slabs, so that a tile's are contiguous as well: `w13_scale`
[rows / 64, H / GROUP, 128] and `w2_scale` [rows / 64, H / GROUP, 64]. By channel, a neuron's gate and up row have one
each (GROUP is H), and `w2_scale` [num_slots, H] is one per expert and output.

Experts in 4 bits are words uint16 of four codes, which stand for inputs far apart: a tile of words is four tiles of
weights, its planes, and nothing moves between threads. Word j of a step of `w13` [2 * rows, H / 4] holds inputs j,
j + PLANE, j + 2 * PLANE and j + 3 * PLANE of the step's BLOCK_K = 4 * PLANE, the first in its lowest bits; word j of
`w2` [rows / 64, H, 16] neurons j, j + 16, j + 32 and j + 48 of a slab. Scales are those of 8 bits in groups.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

# compiled once for all values
SIZES = ("num_routes", "num_experts", "num_m_blocks", "num_n_tiles")
# 2 to the difference of exponent biases from E4M3, 7, to fp16, 15, and bf16, 127
FP16_OVER_E4M3 = tl.constexpr(2.0**8)
BF16_OVER_E4M3 = tl.constexpr(2.0**120)


@triton.constexpr_function
def _places(dtype):
    """How many weights an element has at the end of pointers of `dtype`."""
    return 4 if dtype == tl.pointer_type(tl.uint16) else 1


@triton.jit
def _place(table, index):
    """(first slab int64, number of slabs int32) of the expert at `index` of the table."""
    place = tl.load(table + index)
    return place >> 32, place.to(tl.int32)


@triton.jit
def _tile(num_m_blocks, num_n_tiles, GROUP_M: tl.constexpr):
    """(m, n) of this program: GROUP_M blocks share an n tile before the next, so weights stay in L2."""
    pid = tl.program_id(0)
    group = pid // (GROUP_M * num_n_tiles)
    first_m = group * GROUP_M
    size = min(num_m_blocks - first_m, GROUP_M)
    inside = pid % (GROUP_M * num_n_tiles)
    return first_m + inside % size, inside // size


@triton.jit
def _block(
    route_ids,
    block_slots,
    num_rows,
    table,
    pid_m,
    num_routes,
    num_experts,
    BLOCK_M: tl.constexpr,
    ONE_ROUTE: tl.constexpr,
):
    """(routes [BLOCK_M], rows int64 [BLOCK_M], first row, slot, first slab, slabs) of a block; 0 slabs for no work.

    All loads but the table's, and with ONE_ROUTE the slot's, are independent of each other.
    """
    offs_m = tl.arange(0, BLOCK_M)
    if ONE_ROUTE:
        first_row = pid_m
        expert = tl.load(route_ids + pid_m)
        slot = tl.load(block_slots + 1 + tl.maximum(expert, -1))
        slab, slabs = _place(table, tl.where(expert < 0, num_experts, expert))
        routes = tl.where(offs_m == 0, pid_m, num_routes)
        rows = tl.where(offs_m == 0, pid_m, 0).to(tl.int64)
    else:
        first_row = pid_m * BLOCK_M
        total = tl.load(num_rows)
        slot = tl.load(block_slots + pid_m)
        routes = tl.load(route_ids + first_row + offs_m)
        rows = (first_row + offs_m).to(tl.int64)
        slab, slabs = _place(table, num_experts + 1 + tl.maximum(slot, 0))
        slabs = tl.where(first_row < total, slabs, 0)
    return routes, rows, first_row, slot, slab, slabs


@triton.jit
def _prefetch(w2, slab, slabs, pid_n, H: tl.constexpr, BLOCK_N: tl.constexpr, AHEAD: tl.constexpr):
    """Asks L2 for this tile's part of an expert's first AHEAD slabs, in lines of 128 bytes."""
    LENGTH: tl.constexpr = 1024 // w2.dtype.element_ty.primitive_bitwidth
    DEPTH: tl.constexpr = 64 // _places(w2.dtype)
    LINES: tl.constexpr = BLOCK_N * DEPTH // LENGTH
    line = tl.arange(0, AHEAD * LINES)
    ahead = tl.minimum(line // LINES, tl.maximum(slabs - 1, 0))
    lines = w2 + (slab + ahead) * (DEPTH * H) + (pid_n * LINES + line % LINES) * LENGTH
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;",
        "=r,l",
        [lines.to(tl.int64, bitcast=True)],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def _decode(codes, dtype: tl.constexpr):
    """Codes as numbers of `dtype`, all of them exactly; weights that are no codes as they are.

    By bits, exponent and mantissa go where the wider type has them, which makes a number too small by a power of two:
    a subnormal one of a subnormal one. Casts of E4M3 go by fp32, whose conversion to bf16 takes two numbers at once.
    """
    if codes.dtype == tl.float8e4nv:
        numbers = codes.to(tl.float16).to(tl.float32)
    elif codes.dtype != tl.uint8:
        numbers = codes
    elif dtype == tl.bfloat16:
        bits = codes.to(tl.int8, bitcast=True).to(tl.int16)  # copies of the sign before it
        numbers = (bits << 4 & -0x7810).to(tl.bfloat16, bitcast=True) * BF16_OVER_E4M3
    else:
        bits = codes.to(tl.int8, bitcast=True).to(tl.int16)
        numbers = (bits << 7 & -0x4080).to(tl.float16, bitcast=True) * FP16_OVER_E4M3
    return numbers.to(dtype)


@triton.jit
def _plane(words, PLACE: tl.constexpr, dtype: tl.constexpr):
    """The codes in one place of words, four bits with 8 added, as numbers of `dtype`.

    They become the lowest bits of a mantissa, of 128 in bf16 and of 1024 in fp16, which is then taken away: for bf16 in
    three instructions for two numbers, which the compiler does not find.
    """
    if dtype == tl.bfloat16:
        numbers = tl.inline_asm_elementwise(
            f"""{{
            .reg .b32 bits, one, base;
            shr.b32 bits, $1, {4 * PLACE};
            lop3.b32 bits, bits, 0x000f000f, 0x43004300, 0xea;  // bits & mask | exponents of 128
            mov.b32 one, 0x3f803f80;
            mov.b32 base, 0xc308c308;  // -136
            fma.rn.bf16x2 $0, bits, one, base;
            }}""",
            "=r,r",
            [words],
            dtype=tl.bfloat16,
            is_pure=True,
            pack=2,
        )
    else:
        numbers = ((words >> 4 * PLACE & 15) | 0x6400).to(tl.float16, bitcast=True) - 1032.0
    return numbers.to(dtype)


@triton.jit
def _scaled_plane(words, PLACE: tl.constexpr, scale, dtype: tl.constexpr):
    """`_plane` times the scales of its rows or columns: in bf16, or in fp32 where `dtype` has fewer exponents."""
    if dtype == tl.bfloat16:
        numbers = _plane(words, PLACE, dtype) * scale.to(dtype)
    else:
        numbers = _plane(words, PLACE, tl.float32) * scale
    return numbers.to(dtype)


@triton.jit
def _scale_ptrs(w13_scale, slab, rows, GROUP: tl.constexpr, H: tl.constexpr):
    """Pointers [len(rows)] to the scales of an expert's interleaved rows for its first inputs."""
    ptrs = rows
    if GROUP != 0:
        ptrs = w13_scale + (slab + rows // 128) * (H // GROUP * 128) + rows % 128
    return ptrs


@triton.jit
def _step_scale(scale_ptrs, k, GROUP: tl.constexpr, H: tl.constexpr):
    """Scales of columns in the step from input k on, or in the last one; a placeholder where all steps share them.

    They are loaded a step ahead: the compiler's pipeline fetches nothing but what goes into a dot.
    """
    if GROUP == 0 or GROUP == H:
        scale = tl.full((1,), 1.0, tl.float32)
    else:
        scale = tl.load(scale_ptrs + tl.minimum(k, H - GROUP) // GROUP * 128)
    return scale


@triton.jit
def _add_product(total, a, codes, scale, GROUP: tl.constexpr, H: tl.constexpr, PRECISION: tl.constexpr):
    """total + a . codes, their product times `scale` if the step has scales of its own."""
    weights = _decode(codes, a.dtype)
    if GROUP == 0 or GROUP == H:
        total = tl.dot(a, weights, total, input_precision=PRECISION)
    else:
        total += tl.dot(a, weights, input_precision=PRECISION) * scale[None, :]
    return total


@triton.jit
def _scale_sum(total, scale_ptrs, GROUP: tl.constexpr, H: tl.constexpr):
    """The sum over all inputs, scaled where they share a scale."""
    if GROUP == H:
        total *= tl.load(scale_ptrs)[None, :]
    return total


@triton.jit(do_not_specialize=SIZES)
def ragged_up_kernel(
    x, stride_xm,
    w13, w13_scale, table, hidden,
    stride_hm, route_ids, block_slots, num_rows,
    num_routes, num_experts, num_m_blocks, num_n_tiles,
    H: tl.constexpr, TOP_K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
    ONE_ROUTE: tl.constexpr, PRECISION: tl.constexpr,
    FUSED: tl.constexpr, GROUP: tl.constexpr, TMA: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    """hidden[row, n] = silu(gate_n . x) * (up_n . x) for n below the expert's width, rows in block order.

    Grid: (num_m_blocks * num_n_tiles,), num_n_tiles = ceil(widest / BLOCK_N). `x` [T, H]. `hidden`
    [blocks * BLOCK_M (or blocks with ONE_ROUTE), >= widest]. H must be a multiple of BLOCK_K. FUSED: one product with
    2 * BLOCK_N interleaved rows instead of two with BLOCK_N. GROUP: inputs that share a scale, a multiple of BLOCK_K; 0
    for weights that are no codes. In 4 bits (FUSED) it is a multiple of BLOCK_K / 4, and in blocks of 64 rows and more
    weights are multiplied by it, not sums: that costs one instruction for two weights, not one per sum and plane. TMA
    (with FUSED, no codes): `w13` is a descriptor of blocks [2 * BLOCK_N, BLOCK_K].
    """
    pid_m, pid_n = _tile(num_m_blocks, num_n_tiles, GROUP_M)
    if CHAINED:
        gdc_wait()
        gdc_launch_dependents()
    routes, rows, _, _, slab, slabs = _block(
        route_ids, block_slots, num_rows, table, pid_m, num_routes, num_experts, BLOCK_M, ONE_ROUTE
    )
    width = slabs * 64
    if pid_n * BLOCK_N >= width:
        return
    valid = routes < num_routes
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    PLACES: tl.constexpr = _places(w13.dtype)
    PLANE: tl.constexpr = BLOCK_K // PLACES
    offs_k = tl.arange(0, PLANE)
    x_ptrs = x + (routes // TOP_K).to(tl.int64)[:, None] * stride_xm + offs_k[None, :]
    if FUSED:
        both = tl.zeros((BLOCK_M, 2 * BLOCK_N), dtype=tl.float32)
        if TMA:
            first = (slab * 128).to(tl.int32) + pid_n * (2 * BLOCK_N)
            for k in range(0, H, BLOCK_K):
                a = tl.load(x_ptrs + k, mask=valid[:, None], other=0.0)
                both = tl.dot(a, w13.load([first, k]).T, both, input_precision=PRECISION)
        else:
            offs_2n = pid_n * (2 * BLOCK_N) + tl.arange(0, 2 * BLOCK_N)
            rows_2n = tl.where(offs_2n < 2 * width, offs_2n, 0)
            w_ptrs = w13 + (slab * 128 + rows_2n)[None, :] * (H // PLACES) + offs_k[:, None]
            scale_ptrs = _scale_ptrs(w13_scale, slab, rows_2n, GROUP, H)
            if PLACES == 1:
                scale = _step_scale(scale_ptrs, 0, GROUP, H)
                for k in range(0, H, BLOCK_K):
                    next_scale = _step_scale(scale_ptrs, k + BLOCK_K, GROUP, H)
                    a = tl.load(x_ptrs + k, mask=valid[:, None], other=0.0)
                    both = _add_product(both, a, tl.load(w_ptrs + k), scale, GROUP, H, PRECISION)
                    scale = next_scale
                both = _scale_sum(both, scale_ptrs, GROUP, H)
            elif BLOCK_M < 64:
                scale = _step_scale(scale_ptrs, 0, GROUP, H)
                for k in range(0, H, BLOCK_K):
                    words = tl.load(w_ptrs + k // PLACES)
                    for place in tl.static_range(PLACES):
                        next_scale = _step_scale(scale_ptrs, k + (place + 1) * PLANE, GROUP, H)
                        a = tl.load(x_ptrs + (k + place * PLANE), mask=valid[:, None], other=0.0)
                        both = _add_product(both, a, _plane(words, place, a.dtype), scale, GROUP, H, PRECISION)
                        scale = next_scale
                both = _scale_sum(both, scale_ptrs, GROUP, H)
            else:
                for k in range(0, H, BLOCK_K):
                    words = tl.load(w_ptrs + k // PLACES)
                    for place in tl.static_range(PLACES):
                        a = tl.load(x_ptrs + (k + place * PLANE), mask=valid[:, None], other=0.0)
                        scale = tl.load(scale_ptrs + (k + place * PLANE) // GROUP * 128)
                        b = _scaled_plane(words, place, scale[None, :], a.dtype)
                        both = tl.dot(a, b, both, input_precision=PRECISION)
        gate, up = tl.split(both.reshape(BLOCK_M, BLOCK_N, 2))
    else:
        neurons = tl.where(offs_n < width, offs_n, 0)
        gate_ptrs = w13 + (slab * 128 + 2 * neurons)[None, :] * H + offs_k[:, None]
        gate = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        up = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        gate_scale_ptrs = _scale_ptrs(w13_scale, slab, 2 * neurons, GROUP, H)
        up_scale_ptrs = _scale_ptrs(w13_scale, slab, 2 * neurons + 1, GROUP, H)
        gate_scale = _step_scale(gate_scale_ptrs, 0, GROUP, H)
        up_scale = _step_scale(up_scale_ptrs, 0, GROUP, H)
        for k in range(0, H, BLOCK_K):
            next_gate_scale = _step_scale(gate_scale_ptrs, k + BLOCK_K, GROUP, H)
            next_up_scale = _step_scale(up_scale_ptrs, k + BLOCK_K, GROUP, H)
            a = tl.load(x_ptrs + k, mask=valid[:, None], other=0.0)
            gate = _add_product(gate, a, tl.load(gate_ptrs + k), gate_scale, GROUP, H, PRECISION)
            up = _add_product(up, a, tl.load(gate_ptrs + H + k), up_scale, GROUP, H, PRECISION)
            gate_scale = next_gate_scale
            up_scale = next_up_scale
        gate = _scale_sum(gate, gate_scale_ptrs, GROUP, H)
        up = _scale_sum(up, up_scale_ptrs, GROUP, H)
    product = gate / (1 + tl.exp(-gate)) * up
    tl.store(
        hidden + rows[:, None] * stride_hm + offs_n[None, :],
        product.to(hidden.dtype.element_ty),
        mask=valid[:, None] & (offs_n[None, :] < width),
    )


@triton.jit(do_not_specialize=SIZES)
def ragged_down_kernel(
    hidden, stride_hm,
    w2, w2_scale, table, routed,
    route_ids, block_slots, num_rows,
    num_routes, num_experts, num_m_blocks, num_n_tiles,
    H: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
    ONE_ROUTE: tl.constexpr, PRECISION: tl.constexpr,
    GROUP: tl.constexpr, BY_CHANNEL: tl.constexpr,
    TMA: tl.constexpr, CHAINED: tl.constexpr, PREFETCH: tl.constexpr,
):  # fmt: skip
    """routed[route] = down_e(hidden of that route) [num_routes, H], over the expert's own width.

    Grid: (num_m_blocks * num_n_tiles,), num_n_tiles = H / BLOCK_N. `hidden` as written by `ragged_up_kernel`. H must be
    a multiple of BLOCK_N, and 64 of BLOCK_K, so that the loop ends exactly at the expert's width. GROUP:
    outputs that share a neuron's scale, a multiple of BLOCK_N, with which weights are multiplied; BY_CHANNEL: outputs
    have a scale, with which sums are; 0 and False for weights that are no codes. In 4 bits BLOCK_K is 64. TMA (BLOCK_K
    64, no codes): `hidden` and `w2` are descriptors of blocks [BLOCK_M, 64] and, of slabs' rows [rows / 64 * H, 64],
    [BLOCK_N, 64].
    PREFETCH (with CHAINED, without TMA): slabs of `w2` to bring into L2 while `ragged_up_kernel` drains.
    """
    pid_m, pid_n = _tile(num_m_blocks, num_n_tiles, GROUP_M)
    routes, rows, first_row, slot, slab, slabs = _block(
        route_ids, block_slots, num_rows, table, pid_m, num_routes, num_experts, BLOCK_M, ONE_ROUTE
    )
    if PREFETCH:
        _prefetch(w2, slab, slabs, pid_n, H, BLOCK_N, PREFETCH)
    if CHAINED:
        gdc_wait()
        gdc_launch_dependents()
    if slabs == 0:
        return
    width = slabs * 64
    valid = routes < num_routes
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    if TMA:
        first = (slab * H).to(tl.int32) + pid_n * BLOCK_N
        for k in range(0, width, BLOCK_K):
            b = w2.load([first + (k // 64) * H, 0])
            total = tl.dot(hidden.load([first_row, k]), b.T, total, input_precision=PRECISION)
    elif _places(w2.dtype) == 4:
        offs_plane = tl.arange(0, 16)
        hidden_ptrs = hidden + rows[:, None] * stride_hm + offs_plane[None, :]
        w2_ptrs = w2 + slab * (16 * H) + offs_n[None, :] * 16 + offs_plane[:, None]
        scale_ptrs = w2_scale + (slab * (H // GROUP) + pid_n * BLOCK_N // GROUP) * 64 + offs_plane
        for k in range(0, width, 64):
            words = tl.load(w2_ptrs + k // 64 * (16 * H))
            for place in tl.static_range(4):
                a = tl.load(hidden_ptrs + (k + place * 16), mask=valid[:, None], other=0.0)
                scale = tl.load(scale_ptrs + (k // 64 * (H // GROUP * 64) + place * 16))
                b = _scaled_plane(words, place, scale[:, None], a.dtype)
                total = tl.dot(a, b, total, input_precision=PRECISION)
    else:
        offs_k = tl.arange(0, BLOCK_K)
        hidden_ptrs = hidden + rows[:, None] * stride_hm + offs_k[None, :]
        w2_ptrs = w2 + slab * (64 * H) + offs_n[None, :] * 64 + offs_k[:, None]
        for k in range(0, width, BLOCK_K):
            a = tl.load(hidden_ptrs + k, mask=valid[:, None], other=0.0)
            b = tl.load(w2_ptrs + tl.multiple_of((k // 64) * (64 * H) + k % 64, 16))
            if GROUP == 0 or BY_CHANNEL:
                b = _decode(b, a.dtype)
            else:
                group = (slab + k // 64) * (H // GROUP) + pid_n * BLOCK_N // GROUP
                scale = tl.load(w2_scale + group * 64 + k % 64 + offs_k)
                b = (_decode(b, tl.float32) * scale[:, None]).to(a.dtype)
            total = tl.dot(a, b, total, input_precision=PRECISION)
        if BY_CHANNEL:
            total *= tl.load(w2_scale + slot.to(tl.int64) * H + offs_n)[None, :]
    tl.store(
        routed + routes.to(tl.int64)[:, None] * H + offs_n[None, :],
        total.to(routed.dtype.element_ty),
        mask=valid[:, None],
    )


@triton.jit(do_not_specialize=SIZES)
def combine_kernel(
    routed,
    topk_weights,
    topk_ids,
    table,
    num_experts,
    output,
    stride_om,
    H: tl.constexpr,
    TOP_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CHAINED: tl.constexpr,
):
    """output[t] = sum over k of topk_weights[t, k] * routed[t, k], fp32 in fixed order, absent experts left out.

    Grid: (T, ceil(H / BLOCK_N)). `routed` [T * TOP_K, H], `topk_weights` float32 and `topk_ids` int32 [T, TOP_K]. Rows
    and weights of absent experts may be NaN: neither is used.
    """
    token = tl.program_id(0).to(tl.int64)
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    total = tl.zeros((BLOCK_N,), dtype=tl.float32)
    if CHAINED:
        gdc_wait()
    for k in tl.static_range(TOP_K):
        route = token * TOP_K + k
        expert = tl.load(topk_ids + route)
        _, slabs = _place(table, tl.where(expert < 0, num_experts, expert))
        weight = tl.where(slabs > 0, tl.load(topk_weights + route).to(tl.float32), 0.0)
        part = tl.load(routed + route * H + offs_n, mask=offs_n < tl.where(slabs > 0, H, 0), other=0.0)
        total += weight * part.to(tl.float32)
    tl.store(output + token * stride_om + offs_n, total.to(output.dtype.element_ty), mask=offs_n < H)
