# SPDX-License-Identifier: Apache-2.0
"""Triton kernels against the torch reference: interpreted on a CPU (fp32, fp16), native on a GPU (bf16 too)."""

import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import NamedTuple

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from heapr_vllm.formats.quantized import pack_nibbles
from heapr_vllm.model_executor.kernels.base import ExpertRows, Scales
from heapr_vllm.model_executor.kernels.triton import launch, route_blocks
from heapr_vllm.model_executor.kernels.triton.jit import BF16_OVER_E4M3, _decode, _plane
from heapr_vllm.model_executor.kernels.triton.launch import index_tables, pack
from heapr_vllm.model_executor.kernels.triton.route_blocks import align_routes, max_blocks
from heapr_vllm.model_executor.kernels.triton.tiles import LayerShape, use_one_route_blocks
from heapr_vllm.model_executor.kernels.triton.tuned_files import configs_up_to
from heapr_vllm.model_executor.storage.layout import RaggedLayout
from heapr_vllm.model_executor.storage.traffic_sums import TrafficSums
from tests.model_executor.engine import ROOT
from tests.model_executor.kernels.moe_cases import (
    CASES,
    CASES_IN_4_BITS,
    CASES_IN_8_BITS,
    DEVICE,
    HAS_CAST,
    SMALL,
    STRATEGIES,
    TOLERANCE,
    Case,
    build,
    copied,
    fenced_scratch,
    is_fenced,
)

SEVERAL = Case(9, [64, 128], 1, 64)
THREE = Case(9, [64, 128, 64], 2, 64)
IN_4_BITS = SEVERAL.in_4_bits(32)
DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if DEVICE == "cuda" else [])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES + CASES_IN_8_BITS + CASES_IN_4_BITS, ids=str)
def test_against_reference(case: Case, dtype: torch.dtype) -> None:
    """Scratch starts as NaN, and no memory outside of it and of the output is touched."""
    layer = build(case, dtype)
    with fenced_scratch():
        output = layer.run(case.config)
    assert layer.error(output) < TOLERANCE[dtype] and is_fenced(output)
    assert torch.equal(output, layer.run(case.config)), "not deterministic"


@pytest.mark.parametrize("case", CASES, ids=str)
def test_traffic_against_reference(case: Case) -> None:
    layer = build(case, torch.float32)
    found, expected = (no_traffic(layer.plain) for _ in range(2))
    traced = layer._replace(experts=replace(layer.experts, traffic=found))
    with fenced_scratch():
        output = traced.run(case.config)
    assert torch.equal(output, layer.run(case.config))
    layer._replace(plain=replace(layer.plain, traffic=expected)).expected()
    assert torch.equal(found.tokens, expected.tokens)
    for slot, (_, width) in enumerate(layer.plain.table.tolist()):
        torch.testing.assert_close(
            found.activation_sq[slot, :width], expected.activation_sq[slot, :width], rtol=1e-4, atol=1e-4
        )


def no_traffic(experts: ExpertRows) -> TrafficSums:
    slots = len(experts.table)
    energy = torch.zeros(slots, experts.max_width, dtype=torch.float64, device=DEVICE)
    return TrafficSums(energy, torch.zeros(slots, dtype=torch.int64, device=DEVICE))


@triton.jit
def decode_kernel(codes, numbers, BLOCK: tl.constexpr):
    """Grid (1,). `codes` and `numbers` [BLOCK]."""
    places = tl.arange(0, BLOCK)
    tl.store(numbers + places, _decode(tl.load(codes + places), numbers.dtype.element_ty))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("stored", [torch.int8, torch.float8_e4m3fn, torch.uint8], ids=str)
def test_every_code_is_decoded_exactly(stored: torch.dtype, dtype: torch.dtype) -> None:
    """Subnormal ones too; uint8 is E4M3 decoded by bits, for which the codes of NaN are numbers as well."""
    codes = torch.arange(256, dtype=torch.uint8, device=DEVICE)
    expected = codes.view(torch.float8_e4m3fn if stored == torch.uint8 else stored).to(dtype)
    numbers = torch.empty_like(expected)
    if stored == torch.float8_e4m3fn and not HAS_CAST:
        pytest.skip("this GPU does not cast E4M3")
    decode_kernel[(1,)](codes.view(stored), numbers, 256)
    is_number = ~expected.isnan()
    assert torch.equal(numbers[is_number], expected[is_number]) and int(is_number.sum()) >= 254
    assert torch.equal(numbers.signbit()[is_number], expected.signbit()[is_number]), "-0 is kept"


@triton.jit
def plane_kernel(words, numbers, BLOCK: tl.constexpr):
    """Grid (n,). `words` [n * BLOCK] and `numbers` [4, n * BLOCK]."""
    places = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    for place in tl.static_range(4):
        decoded = _plane(tl.load(words + places), place, numbers.dtype.element_ty)
        tl.store(numbers + place * tl.num_programs(0) * BLOCK + places, decoded)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_word_is_decoded_exactly(dtype: torch.dtype) -> None:
    words = torch.arange(2**16, dtype=torch.int32, device=DEVICE)
    numbers = torch.empty(4, 2**16, dtype=dtype, device=DEVICE)
    plane_kernel[(64,)](words.to(torch.uint16), numbers, 2**10)
    for place, found in enumerate(numbers):
        assert torch.equal(found, ((words >> 4 * place & 15) - 8).to(dtype))


def test_bits_of_e4m3_in_bf16() -> None:
    """What `_decode` does for bf16, which the interpreter gets wrong: exact in torch, subnormal numbers too."""
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
    bits = codes.view(torch.int8).to(torch.int16) << 4 & -0x7810
    numbers, expected = bits.view(torch.bfloat16) * BF16_OVER_E4M3.value, codes.to(torch.bfloat16)
    is_number = ~expected.isnan()
    assert numbers.dtype == torch.bfloat16 and torch.equal(numbers[is_number], expected[is_number])


def test_bits_of_4_bits_in_bf16() -> None:
    """What `_plane` does for bf16 in instructions of the GPU: two words of a register at once, each place in turn."""
    words = torch.arange(2**16, dtype=torch.int32).to(torch.uint16)
    for place in range(4):
        bits = words.view(torch.int32).long() % 2**32 >> 4 * place & 0x000F000F | 0x43004300
        numbers = bits.to(torch.int32).view(torch.bfloat16) * 1.0 + -136.0
        assert numbers.dtype == torch.bfloat16
        assert torch.equal(numbers.float(), (words.int() >> 4 * place & 15).float() - 8)


def test_decodes_are_as_chosen() -> None:
    codes = torch.zeros(2, dtype=torch.float8_e4m3fn)
    by_bits, by_cast = (launch._weights(codes, replace(SMALL, decode=decode)).dtype for decode in ("bits", "cast"))
    assert (by_bits, by_cast) == (torch.uint8, torch.float8_e4m3fn)
    assert launch._weights(codes.view(torch.int8), SMALL).dtype == torch.int8
    assert launch._weights(codes.view(torch.uint8), SMALL).dtype == torch.uint16


@pytest.mark.parametrize("case", [*(SEVERAL.in_8_bits("int", strategy) for strategy in STRATEGIES), IN_4_BITS], ids=str)
def test_scales_beyond_fp16_do_not_underflow(case: Case) -> None:
    """Products of small scales and of intermediates are less than fp16 has numbers for."""
    layer = build(case, torch.float16)
    layer.experts.scales.w2.mul_(1e-4)
    layer.plain.scales.w2.mul_(1e-4)
    layer.experts.scales.w13.mul_(3)
    layer.plain.scales.w13.mul_(3)
    assert layer.error(layer.run(case.config)) < 10 * TOLERANCE[torch.float16]


@settings(deadline=None, max_examples=40)
@given(
    tokens=st.integers(1, 40),
    num_slots=st.integers(1, 9),
    top_k=st.integers(1, 3),
    block_m=st.sampled_from([1, 4, 16]),
    seed=st.integers(0, 50),
)
def test_alignment(tokens: int, num_slots: int, top_k: int, block_m: int, seed: int) -> None:
    """Every stored route is in exactly one row, of a block of its own slot; absent routes are in none."""
    generator = torch.Generator().manual_seed(seed)
    topk_ids = torch.randint(-1, num_slots + 1, (tokens, top_k), dtype=torch.int32, generator=generator)
    order = torch.randperm(num_slots + 1, generator=generator)  # one expert has no slot
    slots = torch.where(order < num_slots, order, -1)
    route_ids, block_slots, num_rows = align_routes(
        topk_ids, torch.cat([slots.new_full((1,), -1), slots]).int(), num_slots, block_m
    )
    flat, seen = [int(slots[i]) if i >= 0 else -1 for i in topk_ids.flatten().tolist()], []
    assert len(block_slots) == max_blocks(len(flat), num_slots, block_m) and int(num_rows) % block_m == 0
    assert int(num_rows) <= len(block_slots) * block_m
    for row in range(int(num_rows)):
        if (route := int(route_ids[row])) < len(flat):
            assert flat[route] == int(block_slots[row // block_m])
            seen.append(route)
    assert sorted(seen) == [route for route, slot in enumerate(flat) if slot >= 0]
    assert (route_ids[int(num_rows) :] >= len(flat)).all()
    used = block_slots[: int(num_rows) // block_m]
    assert (used.diff() >= 0).all(), "widest experts, the lowest slots, come first"
    assert (block_slots[int(num_rows) // block_m :] == -1).all()


def test_blocks_are_not_wasted() -> None:
    assert max_blocks(33, 1, 16) == 3 and max_blocks(2, 8, 16) == 2 and max_blocks(40, 8, 16) == 10


@pytest.mark.slow
def test_a_mutation_of_any_index_computation_is_noticed() -> None:
    run = subprocess.run([sys.executable, "-m", "tools.mutants"], capture_output=True, text=True, cwd=ROOT)
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-1000:]


@contextmanager
def counted_launches(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter]:
    """Kernels launched inside: ours by name, and every torch operator that is no allocation and no view."""
    counts = Counter()

    class CountOperators(TorchDispatchMode):
        def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
            if not operator.is_view and not operator.__name__.startswith(("empty", "new_empty")):
                counts[operator.__name__] += 1
            return operator(*args, **(kwargs or {}))

    for name in ("ragged_up_kernel", "ragged_down_kernel", "combine_kernel"):
        monkeypatch.setattr(launch, name, CountedKernel(name, counts))
    with CountOperators():
        yield counts


class CountedKernel(NamedTuple):
    """Stands in for a kernel: counts launches and runs nothing."""

    name: str
    counts: Counter

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *args, **kwargs: self.counts.update([self.name])


OURS = {"ragged_up_kernel": 1, "ragged_down_kernel": 1, "combine_kernel": 1}


@pytest.mark.skipif(DEVICE == "cuda", reason="counts what a stand-in for vLLM's op gets; test_scale.py profiles")
def test_an_aligned_layer_launches_nothing_but_vllms_alignment_and_three_kernels(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """vLLM's op itself is two kernels, one for up to 64 experts and fewer than 1024 routes: 5 launches, or 4."""
    layer = build(Case(40, [64] * 64, 2, 64, None, (3,), "nobody"), torch.float32)

    def vllms_op(ids: torch.Tensor, block_size: int, num_experts: int, **options) -> tuple[torch.Tensor, ...]:
        assert ids is layer.routes.ids, "as the router gave them: no gather, no copy"
        assert num_experts == 64, "65 would cost the one-kernel path"
        expert_map = options.pop("expert_map")
        assert expert_map.tolist()[3] == -1 and expert_map.storage_offset() == layer.routes.slots.storage_offset() + 1
        assert options == {"pad_sorted_ids": True, "ignore_invalid_experts": True}
        return ids, ids, ids

    monkeypatch.setattr(route_blocks, "_has_vllm_op", lambda: True)
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    monkeypatch.setattr("vllm.model_executor.layers.fused_moe.moe_align_block_size.moe_align_block_size", vllms_op)
    output = torch.empty_like(layer.x)
    with counted_launches(monkeypatch) as counts:
        launch.triton_ragged_moe(output, *layer.inputs, config=SMALL)
    assert counts == OURS


def test_few_routes_take_three_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = build(Case(2, [64] * 16, 2, 64), torch.float32)
    output = torch.empty_like(layer.x)
    with counted_launches(monkeypatch) as counts:
        launch.triton_ragged_moe(output, *layer.inputs)
    assert counts == OURS


def test_warm_up_runs_every_configuration_once(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = build(Case(1, [64, 128] * 8, 2, 64), torch.float16)
    ran = []
    monkeypatch.setattr(launch, "triton_ragged_moe", lambda *_, config, steps: ran.append(config))
    launch.warm_up(layer.routes.slots, layer.experts, 2, 8192)
    assert ran == configs_up_to(layer.shape, 8192) and len(ran) > 4
    monkeypatch.undo()
    launch.warm_up(layer.routes.slots, layer.experts, 2, 1)


def test_a_batch_invariant_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    """With VLLM_BATCH_INVARIANT=1 a token's output is the same bits alone, where blocks would be of one route."""
    layer = build(Case(40, [64, 128] * 8, 2, 64), torch.float16)
    monkeypatch.setenv("VLLM_BATCH_INVARIANT", "1")
    alone = torch.empty_like(layer.x[:1])
    launch.triton_ragged_moe(alone, *layer.first_token())
    assert torch.equal(alone, layer.run(None)[:1])


def test_one_route_blocks_are_for_few_routes() -> None:
    assert use_one_route_blocks(4, 8, 128) and not use_one_route_blocks(5, 8, 128)


def test_packing() -> None:
    """Gate and up rows of a neuron are neighbours, and a slab holds each tile of w2 in one piece."""
    layout = RaggedLayout.build([128, 0, 64], [128, 0, 64])
    w13, w2 = torch.arange(2 * 192 * 6).float().view(-1, 6), torch.arange(192 * 6).float().view(-1, 6)
    gate_up, slabs = w13.clone(), w2.clone()
    pack(gate_up, slabs, layout)
    for row, width, neuron in ((0, 128, 0), (0, 128, 127), (128, 64, 0), (128, 64, 5)):
        assert torch.equal(gate_up[2 * (row + neuron)], w13[2 * row + neuron])
        assert torch.equal(gate_up[2 * (row + neuron) + 1], w13[2 * row + width + neuron])
    for neuron, output in ((0, 0), (63, 5), (64, 0), (127, 3), (128, 1), (191, 5)):
        assert slabs.view(3, 6, 64)[neuron // 64, output, neuron % 64] == w2[neuron, output]


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn], ids=str)
def test_packing_of_codes_and_scales(dtype: torch.dtype) -> None:
    """Codes lie as weights do; scales beside them, in slabs of 64 neurons; scales of outputs stay where they are."""
    layout = RaggedLayout.build([128, 0, 64], [128, 0, 64])
    w13, w2 = (torch.randint(0, 256, (rows, 64), dtype=torch.uint8) for rows in (384, 192))
    w13_scale, w2_scale = torch.arange(384 * 2.0).view(-1, 2), torch.arange(192 * 2.0).view(-1, 2)
    codes, scales = (w13.clone(), w2.clone()), Scales(w13_scale.clone(), w2_scale.clone())
    pack(codes[0].view(dtype), codes[1].view(dtype), layout, scales)
    expected = w13.clone(), w2.clone()
    pack(*expected, layout)
    assert torch.equal(codes[0], expected[0]) and torch.equal(codes[1], expected[1])
    for row, width, neuron in ((0, 128, 0), (0, 128, 127), (128, 64, 0), (128, 64, 5)):
        slab, place = divmod(row + neuron, 64)
        for group in (0, 1):
            gate, up = scales.w13.view(3, 2, 64, 2)[slab, group, place].tolist()
            assert gate == w13_scale[2 * row + neuron, group] and up == w13_scale[2 * row + width + neuron, group]
            assert scales.w2.view(3, 2, 64)[slab, group, place] == w2_scale[row + neuron, group]
    by_output = Scales(torch.rand(384, 1), torch.rand(2, 64))
    kept = by_output.w2.clone()
    pack(w13.view(dtype), w2.view(dtype), layout, by_output)
    assert torch.equal(by_output.w2, kept)


@pytest.mark.parametrize(("hidden", "plane"), [(256, 64), (384, 32), (64, 16)])
def test_packing_in_4_bits(hidden: int, plane: int) -> None:
    """Four inputs, a plane apart, share a word of gate and up, and four neurons of a slab one of down."""
    layout = RaggedLayout.build([128, 0, 64], [128, 0, 64])
    w13, w2 = (torch.randint(-8, 8, (rows, hidden), dtype=torch.int8) for rows in (384, 192))
    scales = Scales(torch.ones(384, hidden // 64), torch.ones(192, hidden // 64))
    packed = pack_nibbles(w13), pack_nibbles(w2)
    pack(*packed, layout, scales)
    both, slabs = packed[0].view(torch.uint16).int(), packed[1].view(torch.uint16).int().view(3, hidden, 16)
    for row, width, neuron in ((0, 128, 0), (0, 128, 127), (128, 64, 0), (128, 64, 5)):
        for index in (0, 1, plane - 1, plane, 2 * plane + 3, hidden - 1):
            step, inside = divmod(index, 4 * plane)
            place, word = divmod(inside, plane)
            for is_up in (0, 1):
                code = (both[2 * (row + neuron) + is_up, step * plane + word] >> 4 * place & 15) - 8
                assert code == w13[2 * row + is_up * width + neuron, index]
    for neuron, output in ((0, 0), (63, 5), (64, 0), (127, 3), (128, hidden - 1), (191, 5)):
        place, word = divmod(neuron % 64, 16)
        assert (slabs[neuron // 64, output, word] >> 4 * place & 15) - 8 == w2[neuron, output]


@pytest.mark.parametrize(
    "case", [*(THREE.in_8_bits("float", strategy) for strategy in STRATEGIES), THREE.in_4_bits(64)]
)
def test_the_kernel_takes_codes_and_scales(case: Case) -> None:
    """`TritonKernel` by the interface of all kernels: from parameters as they were loaded to an output."""
    pytest.importorskip("vllm")
    from heapr_vllm.model_executor.kernels.triton.kernel import TritonKernel

    kernel, dtype = TritonKernel(), torch.float16
    assert kernel.layer_obstacle(dtype, 64, case.scheme) is None
    layer, layout = build(case, dtype), RaggedLayout.build(case.widths, case.widths)
    experts = copied(layer.plain, torch.clone)
    kernel.pack(experts.w13, experts.w2, layout, experts.scales)
    slots, table = (tensor.to(DEVICE) for tensor in kernel.index_tables(layout.slots, layout))
    experts = replace(experts, table=table)
    kernel.warm_up(slots, experts, 2, 1, dtype)
    output = torch.empty_like(layer.x)
    kernel.run(output, layer.x, replace(layer.routes, slots=slots), experts)
    assert layer.error(output) < TOLERANCE[dtype]


def test_warm_up_in_8_bits_needs_the_models_dtype() -> None:
    layer = build(Case(1, [64, 128] * 8, 2, 64).in_8_bits("float", "group"), torch.float16)
    launch.warm_up(layer.routes.slots, layer.experts, 2, 1, torch.float16)


@pytest.mark.parametrize("case", [THREE.in_8_bits("float", "group"), THREE.in_4_bits(32)], ids=str)
def test_tiles_are_chosen_for_codes(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """For the type of tokens, and for how experts are stored."""
    layer = build(case, torch.float16)
    shapes = []
    monkeypatch.setattr(launch, "choose_config", lambda shape, tokens: shapes.append(shape) or case.config)
    launch.triton_ragged_moe(torch.empty_like(layer.x), *layer.inputs)
    assert shapes == [LayerShape.of(case.widths, 64, 2, torch.float16, case.scheme)]


def test_index_tables() -> None:
    layout = RaggedLayout.build([64, 0, 192], [64, 0, 192])
    slot_map, table = index_tables([2, 1, 2, 0, 2], layout)  # of five experts, two are stored here
    assert slot_map.tolist() == [-1, -1, 1, -1, 0, -1]
    wide, narrow = 3, 3 << 32 | 1  # slabs 0 to 2, and slab 3
    assert table.tolist() == [0, narrow, 0, wide, 0, 0, wide, narrow]
