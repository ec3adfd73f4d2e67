# SPDX-License-Identifier: Apache-2.0
"""The kernels at the sizes of real models on a GPU (`make test-gpu`), and at toy sizes in Triton's interpreter.

Random ragged widths including 0, every kind of routing, tiles drawn from what `heapr tune` would try, CUDA graphs,
bitwise repeatability, weights beyond 2^31 elements.
"""

import itertools
import random
from dataclasses import replace

import pytest
import torch

from heapr_vllm.formats.quantized import ExpertScheme
from heapr_vllm.model_executor.kernels.triton import route_blocks
from heapr_vllm.model_executor.kernels.triton.launch import triton_ragged_moe
from heapr_vllm.model_executor.kernels.triton.tiles import Tile, TileConfig
from heapr_vllm.model_executor.kernels.triton.tuned_files import choose_config
from heapr_vllm.model_executor.tuning.search import block_sizes, candidates, changes
from heapr_vllm.model_executor.tuning.synthetic import PAPER_SHAPES, MoEShape
from tests.model_executor.kernels.moe_cases import DEVICE, STRATEGIES, TOLERANCE, Case, Layer, build

ON_GPU = DEVICE == "cuda"
SHAPES = {name: shape for name, shape in PAPER_SHAPES.items() if (name == "tiny") != ON_GPU}
TOKENS = (1, 2, 3, 8, 16, 33, 64, 129, 256, 1024, 4096, 8192) if ON_GPU else (1, 3, 17)
DTYPES = (torch.bfloat16, torch.float16) if ON_GPU else (torch.float16,)
SCHEMES = [
    ExpertScheme(kind, strategy=strategy, group_size=(128 if ON_GPU else 64) if strategy == "group" else None)
    for kind in ("int", "float")
    for strategy in STRATEGIES
] + [ExpertScheme(num_bits=4, group_size=64)]
needs_gpu = pytest.mark.skipif(not ON_GPU, reason="needs a GPU")
needs_hopper = pytest.mark.skipif(not ON_GPU or torch.cuda.get_device_capability()[0] < 9, reason="needs a Hopper GPU")


def random_widths(shape: MoEShape, seed: int) -> list[int]:
    """A quarter dead, a quarter full, the rest anything, multiples of 16."""
    draw = random.Random(seed)
    full = shape.moe_intermediate_size
    return [
        draw.choice((0, full, 16 * draw.randint(1, full // 16), 16 * draw.randint(1, full // 16)))
        for _ in range(shape.num_experts)
    ]


def random_config(layer: Layer, tokens: int, seed: int) -> TileConfig:
    """Any combination that `heapr tune` would time."""
    draw = random.Random(seed)
    block_m = draw.choice(block_sizes(layer.shape, tokens))
    up, down = (draw.choice(candidates(kind, layer.shape, block_m, tokens)) for kind in ("up", "down"))
    config = TileConfig(block_m, up, down)
    for change in draw.sample(changes(layer.shape, tokens), k=min(2, len(changes(layer.shape, tokens)))):
        config = change(config) if change(config).is_possible(layer.shape) else config
    return config


def make(
    name: str,
    tokens: int,
    dtype: torch.dtype,
    routing: str = "random",
    seed: int = 0,
    scheme: ExpertScheme | None = None,
) -> Layer:
    shape = SHAPES[name]
    widths = random_widths(shape, seed)
    return build(Case(tokens, widths, shape.top_k, shape.hidden_size, None, (), routing, scheme), dtype, seed)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("name", SHAPES)
def test_against_fp64(name: str, tokens: int, dtype: torch.dtype) -> None:
    layer = make(name, tokens, dtype, seed=tokens)
    assert layer.error(layer.run(None)) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: f"{scheme.name}-{scheme.strategy}")
@pytest.mark.parametrize("tokens", [1, 64, 2048] if ON_GPU else [1, 17])
@pytest.mark.parametrize("name", SHAPES)
def test_experts_as_codes(name: str, tokens: int, scheme: ExpertScheme, dtype: torch.dtype) -> None:
    """Against the experts that codes and scales stand for."""
    layer = make(name, tokens, dtype, scheme=scheme)
    assert layer.error(layer.run(None)) < TOLERANCE[dtype]


@pytest.mark.parametrize("routing", ["skewed", "one", "nobody"])
@pytest.mark.parametrize("tokens", [1, 64, 2048] if ON_GPU else [1, 20])
@pytest.mark.parametrize("name", SHAPES)
def test_degenerate_routing(name: str, tokens: int, routing: str) -> None:
    layer = make(name, tokens, DTYPES[0], routing)
    assert layer.error(layer.run(None)) < TOLERANCE[DTYPES[0]]


@pytest.mark.parametrize("seed", range(12 if ON_GPU else 3))
@pytest.mark.parametrize("tokens", [1, 32, 1024] if ON_GPU else [2, 30])
@pytest.mark.parametrize(
    "scheme", [None, *SCHEMES[::3], SCHEMES[-1]], ids=lambda scheme: scheme.name if scheme else "dense"
)
def test_tiles_that_tuning_would_try(scheme: ExpertScheme | None, tokens: int, seed: int) -> None:
    layer = make(next(iter(SHAPES)), tokens, DTYPES[0], seed=seed, scheme=scheme)
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
    alone = torch.empty_like(layer.x[:1])
    triton_ragged_moe(alone, *layer.first_token(), config=config)
    assert torch.equal(alone, layer.run(config)[:1])


@needs_hopper
@pytest.mark.parametrize("prefetch", [False, True])
@pytest.mark.parametrize("tokens", [1, 8, 64, 1024])
def test_chained_launches_change_no_bit(tokens: int, prefetch: bool) -> None:
    """A graph of several layers, each reading what the one before wrote: a kernel that starts too early is wrong."""
    layer = make("Qwen3-30B-A3B", tokens, torch.bfloat16)
    plain = choose_config(layer.shape, tokens)
    chained = replace(plain, chained=True, prefetch=prefetch)
    expected = layer_after_layer(layer, plain, 8)
    assert all(torch.equal(expected, layer_after_layer(layer, chained, 8)) for _ in range(20))


def layer_after_layer(layer: Layer, config: TileConfig, depth: int) -> torch.Tensor:
    """The output of a CUDA graph in which every layer's input is the normalised output of the one before."""
    x, *rest = layer.inputs
    states = [x, *(torch.full_like(x, torch.nan) for _ in range(depth))]
    graph = torch.cuda.CUDAGraph()
    for before, after in itertools.pairwise(states):
        triton_ragged_moe(after, before, *rest, config=config)  # compiles
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        for before, after in itertools.pairwise(states):
            triton_ragged_moe(after, before, *rest, config=config)
            after.div_(after.float().std().clamp(min=1e-3))
    graph.replay()
    torch.cuda.synchronize()
    return states[-1]


@needs_hopper
@pytest.mark.parametrize("scheme", [None, *SCHEMES], ids=str)
@pytest.mark.parametrize("tokens", [1, 64, 1024])
def test_every_way_to_run_agrees(tokens: int, scheme: ExpertScheme | None) -> None:
    layer = make("Qwen3-30B-A3B", tokens, torch.bfloat16, scheme=scheme)
    config = choose_config(layer.shape, tokens)
    for change in changes(layer.shape, tokens):
        if change(config).is_possible(layer.shape):
            assert layer.error(layer.run(change(config))) < TOLERANCE[torch.bfloat16], change(config)


@needs_gpu
@pytest.mark.parametrize(("tokens", "launches"), [(1, 3), (64, 5)])
def test_launches_of_a_layer(tokens: int, launches: int) -> None:
    """As PyTorch's profiler counts them; vLLM's alignment of more than 64 experts is two kernels."""
    pytest.importorskip("vllm")
    layer = make("Qwen3-30B-A3B", tokens, torch.bfloat16)
    output = torch.empty_like(layer.x)
    triton_ragged_moe(output, *layer.inputs)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        triton_ragged_moe(output, *layer.inputs)
        torch.cuda.synchronize()
    kernels = [event.name for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    assert len(kernels) == launches, kernels


@needs_gpu
@pytest.mark.parametrize("tokens", [1, 2, 8, 64, 512, 2048])
def test_cuda_graph(tokens: int) -> None:
    """One capture serves every routing: nothing about it was read on the host."""
    layers = [make("Qwen3-30B-A3B", tokens, torch.bfloat16, routing) for routing in ("random", "skewed", "one")]
    first = layers[0]
    x, output = first.x.clone(), torch.empty_like(first.x)
    routes = replace(first.routes, weights=first.routes.weights.clone(), ids=first.routes.ids.clone())
    triton_ragged_moe(output, x, routes, first.experts)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        triton_ragged_moe(output, x, routes, first.experts)
    for layer in reversed(layers):
        x.copy_(layer.x)
        routes.weights.copy_(layer.routes.weights)
        routes.ids.copy_(layer.routes.ids)
        output.fill_(torch.nan)
        graph.replay()
        eager = torch.empty_like(output)
        triton_ragged_moe(eager, x, routes, first.experts)
        assert torch.equal(output, eager) and not eager.isnan().any()


@needs_gpu
def test_weights_beyond_two_to_the_31_elements() -> None:
    big = Case(64, [2048] * 80, 8, 7168, None)
    layer = build(big, torch.bfloat16)
    assert layer.experts.w13.numel() > 2**31
    assert layer.error(layer.run(None)) < TOLERANCE[torch.bfloat16]


@needs_gpu
@pytest.mark.parametrize("tokens", [8, 300])
def test_vllms_alignment_gives_the_same_output(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    if not route_blocks._has_vllm_op():
        pytest.skip("vLLM is not installed")
    layer = make("Qwen3-30B-A3B", tokens, torch.bfloat16, "nobody")
    with_vllm = layer.run(None)
    monkeypatch.setattr(route_blocks, "_has_vllm_op", lambda: False)
    assert torch.equal(with_vllm, layer.run(None))
