# SPDX-License-Identifier: Apache-2.0
"""Triton kernels against the torch reference: interpreted on a CPU (fp32, fp16), native on a GPU (bf16 too)."""

import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from heapr_vllm.model_executor.kernels.triton import launch, route_blocks
from heapr_vllm.model_executor.kernels.triton.launch import index_tables, pack
from heapr_vllm.model_executor.kernels.triton.route_blocks import align_routes, max_blocks
from heapr_vllm.model_executor.kernels.triton.tiles import configs_up_to, use_one_route_blocks
from heapr_vllm.model_executor.storage.layout import RaggedLayout
from tests.model_executor.engine import ROOT
from tests.model_executor.kernels.moe_cases import (
    CASES,
    CASES_IN_8_BITS,
    DEVICE,
    SMALL,
    TOLERANCE,
    Case,
    build,
    fenced_scratch,
    is_fenced,
)

DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if DEVICE == "cuda" else [])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES + CASES_IN_8_BITS, ids=str)
def test_against_reference(case: Case, dtype: torch.dtype) -> None:
    """Scratch starts as NaN, and no memory outside of it and of the output is touched."""
    layer = build(case, dtype)
    with fenced_scratch():
        output = layer.run(case.config)
    assert layer.error(output) < TOLERANCE[dtype] and is_fenced(output)
    assert torch.equal(output, layer.run(case.config)), "not deterministic"


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
    monkeypatch.setattr(launch, "triton_ragged_moe", lambda *_, config: ran.append(config))
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


def test_index_tables() -> None:
    layout = RaggedLayout.build([64, 0, 192], [64, 0, 192])
    slot_map, table = index_tables([2, 1, 2, 0, 2], layout)  # of five experts, two are stored here
    assert slot_map.tolist() == [-1, -1, 1, -1, 0, -1]
    wide, narrow = 3, 3 << 32 | 1  # slabs 0 to 2, and slab 3
    assert table.tolist() == [0, narrow, 0, wide, 0, 0, wide, narrow]
