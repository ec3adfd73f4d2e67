# SPDX-License-Identifier: Apache-2.0
"""Triton kernels for activations in 8 bits against the same rounding in float64: interpreted on a CPU, native on a GPU.

Sums of codes are exact, so the only tolerance is that of float32, except where an activation is nearly half-way between
two codes and falls to the other one.
"""

import itertools
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from heapr_vllm.formats.quantized import LARGEST_CODE, ExpertScheme
from heapr_vllm.model_executor.kernels.base import ExpertRows, Routes
from heapr_vllm.model_executor.kernels.reference import expert_weights, ragged_moe_reference
from heapr_vllm.model_executor.kernels.triton import a8_launch
from heapr_vllm.model_executor.kernels.triton.a8_launch import A8, Rounded
from heapr_vllm.model_executor.kernels.triton.launch import index_tables, triton_ragged_moe
from heapr_vllm.model_executor.kernels.triton.route_blocks import RouteBlocks
from heapr_vllm.model_executor.kernels.triton.tiles import Tile, TileConfig
from heapr_vllm.model_executor.storage.layout import RaggedLayout
from tests.model_executor.kernels.a8_cases import (
    A8_CASES,
    FEW_A8_CASES,
    LIMIT,
    SLAB,
    build,
    codes_of,
    group_of,
    right_e4m3,
    stored_codes,
)
from tests.model_executor.kernels.largest_sums import check_largest_sums
from tests.model_executor.kernels.moe_cases import (
    DEVICE,
    STRATEGIES,
    TOLERANCE,
    Case,
    as_bits,
    copied,
    fenced_scratch,
    is_fenced,
)
from tests.model_executor.kernels.slabs import rounded_slabs
from tests.model_executor.kernels.triton.test_launch import no_traffic

HAS_E4M3 = DEVICE == "cpu" or torch.cuda.get_device_capability() >= (8, 9)
KINDS = ("int", "float") if HAS_E4M3 else ("int",)
RUNNABLE = [case for case in A8_CASES if case.scheme.type in KINDS]
FEW = [case for case in FEW_A8_CASES if case.scheme.type in KINDS]
BF16 = [torch.bfloat16] if DEVICE == "cuda" else []


@pytest.fixture(autouse=True)
def e4m3() -> Iterator[None]:
    with right_e4m3():
        yield


@pytest.mark.parametrize(
    ("case", "dtype"),
    [*itertools.product(RUNNABLE, [torch.float32]), *itertools.product(FEW, [torch.float16, *BF16])],
    ids=str,
)
def test_against_the_same_rounding_in_float64(case: Case, dtype: torch.dtype) -> None:
    """Scratch starts as NaN, and no memory outside of it and of the output is touched."""
    layer = build(case, dtype)
    with fenced_scratch():
        output = layer.run(case.config)
    assert layer.error(output) < max(LIMIT[layer.kind], TOLERANCE[dtype]) and is_fenced(output)
    assert torch.equal(output, layer.run(case.config)), "not deterministic"


@pytest.mark.parametrize("case", FEW, ids=str)
def test_each_step_is_exact(case: Case) -> None:
    """Tokens to codes; those to hidden codes, but for ties; and these, whatever they are, to the output."""
    built = build(case, torch.float32)
    layer, kind, config = built.layer, case.scheme.type, case.config
    x = a8_launch.inputs(layer.x, layer.experts, config)
    codes, scales = codes_of(layer.x, group_of(layer.plain), kind)
    torch.testing.assert_close(x.scales, scales, rtol=1e-6, atol=0)
    assert torch.equal(as_bits(x.codes), as_bits(codes)) or DEVICE == "cuda"  # whose divisions are not exact
    ids = layer.routes.ids
    blocks = RouteBlocks.build(ids, layer.routes.slots, layer.experts.table, config)
    hidden = a8_launch.empty_hidden(layer.x, layer.experts, blocks)
    hidden = Rounded(torch.zeros_like(as_bits(hidden.codes)).view(hidden.codes.dtype), torch.zeros_like(hidden.scales))
    a8_launch.up_projection(hidden, x, layer.experts, case.top_k, blocks, config)
    routed = layer.x.new_full((ids.numel(), case.hidden_size), torch.nan)
    a8_launch.down_projection(routed, hidden, layer.experts, blocks, config)
    values, inputs = hidden.values().double(), x.values().double()
    flipped = total = 0
    for route, row, slot in rows_of_routes(built.layer, blocks, config):
        first, width = layer.plain.table[slot].tolist()
        w13, w2 = weights_of(built.layer, kind, slot)
        gate, up = (w13.double() @ inputs[route // case.top_k]).chunk(2)
        wanted, scale = codes_of((F.silu(gate) * up).float()[None], SLAB, kind)
        off = (hidden.codes[row, :width].float() - wanted[0].float()).abs()
        torch.testing.assert_close(hidden.scales[row, : width // SLAB], scale[0], rtol=1e-5, atol=0)
        assert off.max() <= (1 if kind == "int" else 32)
        flipped, total = flipped + int((off > 0).sum()), total + width
        torch.testing.assert_close(routed[route].double(), values[row, :width] @ w2.double(), rtol=2e-5, atol=1e-5)
    assert total and flipped <= 1e-3 * total


def rows_of_routes(layer, blocks: RouteBlocks, config: TileConfig) -> list[tuple[int, int, int]]:
    """(route, row of hidden, slot) of every route that is stored here."""
    ids = layer.routes.ids.flatten().tolist()
    if config.one_route:
        slots = [int(layer.routes.slots[expert + 1]) for expert in ids]
        return [(route, route, slot) for route, slot in enumerate(slots) if slot >= 0]
    rows = enumerate(blocks.route_ids[: int(blocks.num_rows)].tolist())
    slots = blocks.block_slots.tolist()
    return [(route, row, slots[row // config.block_m]) for row, route in rows if route < len(ids)]


def weights_of(layer, kind: str, slot: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Gate and up [2 * width, H], and down [width, H] rounded again where it is in groups."""
    w13, w2 = expert_weights(layer.plain, slot, *layer.plain.table[slot].tolist())
    return w13, w2 if layer.plain.scales.is_by_channel(w2.shape[1]) else rounded_slabs(w2, kind, SLAB)


@pytest.mark.parametrize("tokens", [1, 20])
@pytest.mark.parametrize("group_size", [32, 128, None])
def test_sums_of_integers_are_exact(group_size: int | None, tokens: int) -> None:
    def run(x: torch.Tensor, experts: ExpertRows, layout: RaggedLayout) -> torch.Tensor:
        experts = copied(experts, lambda tensor: tensor.to(DEVICE))
        A8.pack(experts.w13, experts.w2, layout, experts.scales)
        slots, table = (tensor.to(DEVICE) for tensor in index_tables([0], layout))
        ids = torch.zeros(tokens, 1, dtype=torch.int32, device=DEVICE)
        routes = Routes(torch.ones(tokens, 1, device=DEVICE), ids, slots)
        output = torch.empty_like(x, device=DEVICE)
        config = TileConfig(16, Tile(64, min(group_size or 128, 128)), Tile(32, 64))
        experts = replace(experts, table=table)
        triton_ragged_moe(output, x.to(DEVICE), routes, experts, config=config, steps=A8)
        return output

    check_largest_sums(run, tokens, group_size)


@pytest.mark.parametrize("case", [FEW[0], FEW[-1]], ids=str)  # both ways to make blocks
def test_traffic_is_that_of_rounded_activations(case: Case) -> None:
    layer = build(case, torch.float32).layer
    found, expected = (no_traffic(layer.plain) for _ in range(2))
    output = torch.empty_like(layer.x)
    with fenced_scratch():
        triton_ragged_moe(output, layer.x, layer.routes, replace(layer.experts, traffic=found), case.config, A8)
    routes = replace(layer.routes, slots=layer.plain_slots)
    ragged_moe_reference(layer.x.double(), routes, replace(layer.plain, traffic=expected))
    assert torch.equal(found.tokens, expected.tokens)
    for slot, (_, width) in enumerate(layer.plain.table.tolist()):
        wanted = expected.activation_sq[slot, :width]
        assert (found.activation_sq[slot, :width] - wanted).norm() <= 0.1 * wanted.norm()


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize(("kind", "limit"), [("int", 2e-2), ("float", 6e-2)])
def test_rounding_costs_little(kind: str, limit: float, strategy: str) -> None:
    """Against the experts that codes and scales stand for, relative to the norm of the output."""
    if kind not in KINDS:
        pytest.skip("this GPU does not multiply FP8")
    scheme = ExpertScheme(kind, strategy=strategy, group_size=128 if strategy == "group" else None)
    built = build(Case(64, [192, 256, 128, 64], 2, 256, None, scheme=scheme), torch.float16)
    output, wanted = built.run(None).double(), built.layer.expected()
    assert 1e-3 < (output - wanted).norm() / wanted.norm() < limit


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("case", FEW[1:3], ids=str)
def test_what_is_no_number_shows(case: Case, value: float) -> None:
    """It must not vanish in the rounding; other tokens do not see it."""
    built = build(case, torch.float16)
    clean = built.run(case.config)
    built.layer.x[1, 5] = value
    output = built.run(case.config)
    assert not output[1].isfinite().any()
    others = torch.arange(len(output), device=DEVICE) != 1
    assert torch.equal(output[others], clean[others])


def test_a_token_does_not_depend_on_its_batch() -> None:
    case = FEW[-1]
    layer = build(case, torch.float16)
    alone = torch.empty_like(layer.layer.x[:1])
    triton_ragged_moe(alone, *layer.layer.first_token(), config=case.config, steps=A8)
    assert torch.equal(alone, layer.run(case.config)[:1])


@pytest.mark.parametrize("kind", ["int", "float"])
@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_down_projections_are_rounded_again_by_slabs(group_size: int, kind: str) -> None:
    """In half a step of the slab's scale, which is bf16 and finds room where those in groups have been."""
    case = Case(1, [128, 64, 192], 2, 256, scheme=ExpertScheme(kind, group_size=group_size))
    layer = build(case, torch.float32).layer
    scales = a8_launch.slab_scales(layer.experts.scales.w2, 256)
    rows = layer.experts.w2.numel() // 256
    assert scales.dtype == torch.bfloat16 and scales.shape == (rows // 64, 256)
    codes = layer.experts.w2.view(-1, 256, 64).float()
    values = (codes * scales.float()[..., None]).transpose(1, 2).reshape(rows, 256)
    before = stored_codes(layer.plain)
    assert torch.equal(values, rounded_slabs(before, kind, SLAB))
    step = scales.float().repeat_interleave(64, 0) * (1 if kind == "int" else 32)
    assert ((values - before).abs() <= 0.51 * step).all()
    assert (codes.abs().amax(-1) == LARGEST_CODE[kind]).float().mean() > 0.99


def test_a_reload_starts_from_reloaded_codes() -> None:
    """Packing the same checkpoint into the parameters of the last one gives the same bits."""
    case = FEW[-1]
    layer = build(case, torch.float32).layer
    layout = RaggedLayout.build(case.widths, case.widths)
    again = layer.experts
    for stale, fresh in (
        (again.w13, layer.plain.w13),
        (again.w2, layer.plain.w2),
        (again.scales.w13, layer.plain.scales.w13),
        (again.scales.w2, layer.plain.scales.w2),
    ):
        stale.copy_(fresh)
    first = build(case, torch.float32).layer.experts
    A8.pack(again.w13, again.w2, layout, again.scales)
    assert torch.equal(again.w2, first.w2) and torch.equal(again.w13, first.w13)
    for one, other in ((again.scales.w13, first.scales.w13), (again.scales.w2, first.scales.w2)):
        assert torch.equal(one.view(torch.int32), other.view(torch.int32))


def test_a_dead_layer_is_packed() -> None:
    layer = build(Case(5, [64, 64], 1, 64, None, (0, 1), scheme=ExpertScheme(group_size=64)), torch.float32)
    assert not layer.run(None).any()


def test_it_is_run_by_the_interface_of_all_kernels() -> None:
    """Packed, warmed up and run."""
    pytest.importorskip("vllm")
    from heapr_vllm.model_executor.kernels.triton.a8_kernel import TritonA8Kernel

    kernel, case = TritonA8Kernel(), Case(1, [64, 128] * 4, 2, 64, None, scheme=ExpertScheme(group_size=64))
    built = build(case, torch.float16)
    layer, layout = built.layer, RaggedLayout.build(case.widths, kernel.stored_widths(case.widths))
    experts = copied(layer.plain, torch.clone)
    kernel.pack(experts.w13, experts.w2, layout, experts.scales)
    slots, table = (tensor.to(DEVICE) for tensor in kernel.index_tables(layout.slots, layout))
    experts, output = replace(experts, table=table), torch.empty_like(layer.x)
    kernel.warm_up(slots, experts, case.top_k, 64, layer.x.dtype)
    kernel.run(output, layer.x, replace(layer.routes, slots=slots), experts)
    assert torch.equal(output, built.run(None))
