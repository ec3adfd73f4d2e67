# SPDX-License-Identifier: Apache-2.0
"""The kernels at the sizes of real models on a GPU (`make test-gpu`), and at toy sizes in Triton's interpreter.

Random ragged widths including 0, every kind of routing, tiles drawn from what `heapr tune` would try, CUDA graphs,
bitwise repeatability, weights beyond 2^31 elements.
"""

import random

import pytest
import torch

from heapr_vllm.model_executor.synthetic import PAPER_SHAPES, MoEShape
from heapr_vllm.model_executor.tile_config import Tile, TileConfig
from heapr_vllm.model_executor.triton_moe import triton_ragged_moe
from heapr_vllm.model_executor.tune import block_sizes, candidates
from tests.model_executor.moe_cases import DEVICE, TOLERANCE, Case, Layer, build

ON_GPU = DEVICE == "cuda"
SHAPES = {name: shape for name, shape in PAPER_SHAPES.items() if (name == "tiny") != ON_GPU}
TOKENS = (1, 2, 3, 8, 16, 33, 64, 129, 256, 1024, 4096, 8192) if ON_GPU else (1, 3, 17)
DTYPES = (torch.bfloat16, torch.float16) if ON_GPU else (torch.float16,)
needs_gpu = pytest.mark.skipif(not ON_GPU, reason="needs a GPU")


def random_widths(shape: MoEShape, seed: int) -> list[int]:
    """A quarter dead, a quarter full, the rest anything, multiples of 16."""
    draw = random.Random(seed)
    full = shape.moe_intermediate_size
    return [draw.choice((0, full, 16 * draw.randint(1, full // 16), 16 * draw.randint(1, full // 16)))
            for _ in range(shape.num_experts)]


def random_config(layer: Layer, tokens: int, seed: int) -> TileConfig:
    """Any combination that `heapr tune` would time."""
    draw = random.Random(seed)
    block_m = draw.choice(block_sizes(layer.shape, tokens))
    return TileConfig(block_m, *(draw.choice(candidates(kind, layer.shape, block_m, tokens))
                                 for kind in ("up", "down")))


def make(name: str, tokens: int, dtype: torch.dtype, routing: str = "random", seed: int = 0) -> Layer:
    shape = SHAPES[name]
    return build(Case(tokens, random_widths(shape, seed), shape.top_k, shape.hidden_size, None, (), routing), dtype,
                 seed)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("name", SHAPES)
def test_against_fp64(name: str, tokens: int, dtype: torch.dtype) -> None:
    layer = make(name, tokens, dtype, seed=tokens)
    assert layer.error(layer.run(None)) < TOLERANCE[dtype]


@pytest.mark.parametrize("routing", ["skewed", "one", "nobody"])
@pytest.mark.parametrize("tokens", [1, 64, 2048] if ON_GPU else [1, 20])
@pytest.mark.parametrize("name", SHAPES)
def test_degenerate_routing(name: str, tokens: int, routing: str) -> None:
    layer = make(name, tokens, DTYPES[0], routing)
    assert layer.error(layer.run(None)) < TOLERANCE[DTYPES[0]]


@pytest.mark.parametrize("seed", range(12 if ON_GPU else 3))
@pytest.mark.parametrize("tokens", [1, 32, 1024] if ON_GPU else [2, 30])
def test_tiles_that_tuning_would_try(tokens: int, seed: int) -> None:
    layer = make(next(iter(SHAPES)), tokens, DTYPES[0], seed=seed)
    assert layer.error(layer.run(random_config(layer, tokens, seed))) < TOLERANCE[DTYPES[0]]


@pytest.mark.parametrize("tokens", [1, 64, 4096] if ON_GPU else [1, 20])
@pytest.mark.parametrize("name", SHAPES)
def test_repeated_runs_are_equal(name: str, tokens: int) -> None:
    layer = make(name, tokens, DTYPES[0])
    first = layer.run(None)
    assert all(torch.equal(first, layer.run(None)) for _ in range(20 if ON_GPU else 2))


@pytest.mark.parametrize("tokens", [3, 40])
def test_a_token_does_not_depend_on_its_batch(tokens: int) -> None:
    """With the same tiles the sums of a token run in the same order, whoever it shares a batch with."""
    layer = make(next(iter(SHAPES)), tokens, DTYPES[0])
    config = TileConfig(16, Tile(32, 64), Tile(64, 64))
    x, w13, w2, weights, ids, *tables = layer.inputs
    alone = torch.empty_like(x[:1])
    triton_ragged_moe(alone, x[:1], w13, w2, weights[:1], ids[:1], *tables, config=config)
    assert torch.equal(alone, layer.run(config)[:1])


@needs_gpu
@pytest.mark.parametrize("tokens", [1, 2, 8, 64, 512, 2048])
def test_cuda_graph(tokens: int) -> None:
    """One capture serves every routing: nothing about it was read on the host."""
    layers = [make("Qwen3-30B-A3B", tokens, torch.bfloat16, routing) for routing in ("random", "skewed", "one")]
    x, w13, w2, weights, ids, *tables = layers[0].inputs
    x, weights, ids, output = x.clone(), weights.clone(), ids.clone(), torch.empty_like(x)
    triton_ragged_moe(output, x, w13, w2, weights, ids, *tables)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        triton_ragged_moe(output, x, w13, w2, weights, ids, *tables)
    for layer in reversed(layers):
        for static, fresh in ((x, layer.inputs[0]), (weights, layer.inputs[3]), (ids, layer.inputs[4])):
            static.copy_(fresh)
        output.fill_(torch.nan)
        graph.replay()
        eager = torch.empty_like(output)
        triton_ragged_moe(eager, x, w13, w2, weights, ids, *tables)
        assert torch.equal(output, eager) and not eager.isnan().any()


@needs_gpu
def test_weights_beyond_two_to_the_31_elements() -> None:
    big = Case(64, [2048] * 80, 8, 7168, None)
    layer = build(big, torch.bfloat16)
    assert layer.inputs[1].numel() > 2**31
    assert layer.error(layer.run(None)) < TOLERANCE[torch.bfloat16]


@needs_gpu
@pytest.mark.parametrize("tokens", [8, 300])
def test_vllms_alignment_gives_the_same_output(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from heapr_vllm.model_executor import triton_moe

    if triton_moe._vllm_align() is None:
        pytest.skip("vLLM is not installed")
    layer = make("Qwen3-30B-A3B", tokens, torch.bfloat16, "nobody")
    with_vllm = layer.run(None)
    monkeypatch.setattr(triton_moe, "_vllm_align", lambda: None)
    assert torch.equal(with_vllm, layer.run(None))
