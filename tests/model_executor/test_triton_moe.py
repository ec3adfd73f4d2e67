# SPDX-License-Identifier: Apache-2.0
"""Triton kernels against the torch reference: interpreted on a CPU (fp32, fp16), native on a GPU (bf16 too)."""

import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from heapr_vllm.model_executor.triton_moe import align_routes, max_blocks, pack_down, use_one_route_blocks
from tests.model_executor.engine import ROOT
from tests.model_executor.moe_cases import CASES, DEVICE, TOLERANCE, Case, build, fenced_scratch, is_fenced

DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if DEVICE == "cuda" else [])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_against_reference(case: Case, dtype: torch.dtype) -> None:
    """Scratch starts as NaN, and no memory outside of it and of the output is touched."""
    layer = build(case, dtype)
    with fenced_scratch():
        output = layer.run(case.config)
    assert layer.error(output) < TOLERANCE[dtype] and is_fenced(output)
    assert torch.equal(output, layer.run(case.config)), "not deterministic"


@settings(deadline=None, max_examples=40)
@given(tokens=st.integers(1, 40), num_slots=st.integers(1, 9), top_k=st.integers(1, 3),
       block_m=st.sampled_from([1, 4, 16]), seed=st.integers(0, 50))
def test_alignment(tokens: int, num_slots: int, top_k: int, block_m: int, seed: int) -> None:
    """Every stored route is in exactly one row, of a block of its own slot; absent routes are in none."""
    route_slots = torch.randint(0, num_slots + 1, (tokens, top_k), dtype=torch.int32,
                                generator=torch.Generator().manual_seed(seed))
    route_ids, block_slots, num_rows = align_routes(route_slots, num_slots, block_m)
    flat, seen = route_slots.flatten().tolist(), []
    assert len(block_slots) == max_blocks(len(flat), num_slots, block_m) and int(num_rows) % block_m == 0
    assert int(num_rows) <= len(block_slots) * block_m
    for row in range(int(num_rows)):
        if (route := int(route_ids[row])) < len(flat):
            assert flat[route] == int(block_slots[row // block_m])
            seen.append(route)
    assert sorted(seen) == [route for route, slot in enumerate(flat) if slot < num_slots]
    assert (route_ids[int(num_rows):] >= len(flat)).all()
    used = block_slots[: int(num_rows) // block_m]
    assert (used.diff() >= 0).all(), "widest experts, the lowest slots, come first"
    assert (block_slots[int(num_rows) // block_m :] == num_slots).all()


def test_blocks_are_not_wasted() -> None:
    assert max_blocks(33, 1, 16) == 3 and max_blocks(2, 8, 16) == 2 and max_blocks(40, 8, 16) == 10


def test_a_mutation_of_any_index_computation_is_noticed() -> None:
    run = subprocess.run([sys.executable, "-m", "tests.model_executor.mutants"], capture_output=True, text=True,
                         cwd=ROOT)
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-1000:]


def test_one_route_blocks_are_for_few_routes() -> None:
    assert use_one_route_blocks(4, 8, 128) and not use_one_route_blocks(5, 8, 128)


def test_slabs_hold_each_tile_in_one_piece() -> None:
    w2 = torch.arange(128 * 6).float().view(128, 6)
    packed = w2.clone()
    pack_down(packed)
    slabs = packed.view(2, 6, 64)
    for neuron, output in ((0, 0), (63, 5), (64, 0), (127, 3)):
        assert slabs[neuron // 64, output, neuron % 64] == w2[neuron, output]
