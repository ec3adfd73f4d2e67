# SPDX-License-Identifier: Apache-2.0
"""Triton kernels against the torch reference: interpreted on a CPU (fp32, fp16), native on a GPU (bf16 too)."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from heapr_vllm.model_executor.layout import RaggedLayout
from heapr_vllm.model_executor.reference import ragged_moe_reference
from heapr_vllm.model_executor.triton_moe import (
    Tile,
    TileConfig,
    align_routes,
    default_config,
    max_blocks,
    pack_down,
    triton_ragged_moe,
    use_one_route_blocks,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SMALL = TileConfig(16, Tile(32, 32), Tile(32, 32))
WIDE = TileConfig(16, Tile(128, 64, group_m=4), Tile(64, 64, group_m=2))

# tokens, widths of the experts, top_k, hidden, tiles, experts on another rank, routing
CASES = [
    (1, [64, 128, 64, 192, 64, 64, 64, 64], 2, 64, SMALL, (), "random"),  # decode: a block per route, no alignment
    (1, [0, 64, 0, 0, 0, 64, 0, 128], 2, 64, SMALL, (), "random"),  # decode, mostly dead experts
    (2, [64] * 16, 2, 64, None, (3, 5, 7), "random"),  # decode, expert parallel, default tiles
    (7, [0, 1, 13, 64], 2, 32, SMALL, (), "random"),  # widths 0, 1, odd and full
    (40, [64, 192, 128, 64], 2, 64, WIDE, (), "random"),  # tile wider than most experts, grouped order
    (40, [64, 192, 128, 64], 2, 96, SMALL, (), "skewed"),  # hidden no power of two; one expert gets most tokens
    (33, [64, 64, 128], 1, 64, SMALL, (), "one"),  # every token to one expert, T % BLOCK_M = 1
    (16, [128, 64], 2, 64, WIDE, (), "random"),  # k = E, blocks exactly full
    (50, [64, 0, 128, 64, 320], 3, 64, SMALL, (0, 4), "random"),  # expert parallel: most routes elsewhere
    (5, [64, 64], 1, 64, SMALL, (0, 1), "random"),  # no local expert at all
    (9, [0, 0, 64], 2, 64, SMALL, (), "random"),  # one live expert
    (70, [64, 128] * 3, 2, 128, None, (), "random"),  # default tiles
]


def layer(case: tuple, dtype: torch.dtype, seed: int = 0) -> tuple[tuple, tuple]:
    """(arguments of `triton_ragged_moe`, arguments of the reference); pruned-away memory is poisoned with NaN."""
    tokens, widths, top_k, hidden, _, remote, routing = case
    generator = torch.Generator().manual_seed(seed + tokens)
    local = [w if e not in remote else 0 for e, w in enumerate(widths)]
    layout = RaggedLayout.build(local, [-(-w // 64) * 64 for w in local])
    w13 = torch.zeros(2 * layout.num_rows, hidden, dtype=dtype)
    w2 = torch.zeros(layout.num_rows, hidden, dtype=dtype)
    for expert, width in enumerate(local):
        if width:
            row, stored = layout.place(expert)
            for flat, first in ((w13, 2 * row), (w13, 2 * row + stored), (w2, row)):
                flat[first : first + width] = torch.randn(width, hidden, generator=generator).mul(0.2).to(dtype)
    scores = torch.rand(tokens, len(widths), generator=generator)
    if routing == "skewed":
        scores[:, 1] += 0.5
    if routing == "one":
        scores[:, 2] += 1
    weights, ids = scores.topk(top_k)
    x = torch.randn(tokens, hidden, generator=generator).to(dtype)
    slots = torch.tensor(layout.slots, dtype=torch.int32)
    table = torch.tensor(layout.expert_table(), dtype=torch.int32).view(-1, 2)
    plain = tuple(t.to(DEVICE) for t in (x, w13, w2, weights, ids.int(), slots, table))
    packed = w2.clone()
    pack_down(packed)
    return (*plain[:2], packed.to(DEVICE), *plain[3:], layout.max_width), plain


DTYPES = {torch.float32: 1e-5, torch.float16: 2e-3} | ({torch.bfloat16: 1e-2} if DEVICE == "cuda" else {})


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"T{case[0]}-{'_'.join(map(str, case[1]))}-{case[6]}")
def test_against_reference(case: tuple, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments, plain = layer(case, dtype)
    x, w13, w2, *rest = plain
    expected = ragged_moe_reference(x.double(), w13.double(), w2.double(), *rest)
    poison_new_memory(monkeypatch)
    output = torch.full_like(x, torch.nan)
    triton_ragged_moe(output, *arguments, config=case[4])
    error = (output.double() - expected.double()).abs().max() / expected.double().abs().max().clamp(min=1e-9)
    assert error < DTYPES[dtype]
    again = torch.full_like(x, torch.nan)
    triton_ragged_moe(again, *arguments, config=case[4])
    assert torch.equal(output, again), "not deterministic"


def poison_new_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scratch starts as NaN, so that reading what was not written shows."""
    def poisoned(self: torch.Tensor, *shape: int, **options) -> torch.Tensor:
        return self.new_full(shape, torch.nan if self.is_floating_point() else -(2**30), **options)

    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned)


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


def test_one_route_blocks_are_for_few_routes() -> None:
    assert use_one_route_blocks(4, 8, 128) and not use_one_route_blocks(5, 8, 128)


def test_slabs_hold_each_tile_in_one_piece() -> None:
    w2 = torch.arange(128 * 6).float().view(128, 6)
    packed = w2.clone()
    pack_down(packed)
    slabs = packed.view(2, 6, 64)
    for neuron, output in ((0, 0), (63, 5), (64, 0), (127, 3)):
        assert slabs[neuron // 64, output, neuron % 64] == w2[neuron, output]


@pytest.mark.parametrize("tokens", [1, 8, 32, 64, 256, 1024, 4096, 8192])
@pytest.mark.parametrize("shape", [(128, 8, 2048), (64, 6, 2048), (60, 4, 2048), (64, 8, 3584)])
def test_default_tiles_fit_the_paper_models(tokens: int, shape: tuple[int, int, int]) -> None:
    num_experts, top_k, hidden = shape
    default_config(tokens, top_k, num_experts, hidden).check(hidden)


@pytest.mark.parametrize(("config", "message"), [
    (TileConfig(16, Tile(32, 48), Tile(32, 32)), "hidden size 64 is no multiple"),
    (TileConfig(16, Tile(32, 32), Tile(48, 32)), "hidden size 64 is no multiple"),
    (TileConfig(16, Tile(32, 32), Tile(32, 128)), "down.block_k 128 does not divide 64"),
])
def test_tiles_that_do_not_fit(config: TileConfig, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config.check(64)
