# SPDX-License-Identifier: Apache-2.0
"""`benchmarks.layer_model`: its simulation where the answer is known, its bounds, the published times it is held to."""

import csv
import importlib.util
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from benchmarks import layer_model, moe_layer
from benchmarks.event_simulation import GPUS, Gpu, Grid, simulate
from benchmarks.layer_kernels import (
    AFTER,
    BEFORE,
    STOCK,
    Blocks,
    Code,
    chained,
    predict,
    residency,
    route_counts,
    up_grid,
)
from benchmarks.modelled_tiles import GemmTile, LayerTiles, stock_candidates, stock_defaults, stock_tiles, tiles_before
from heapr_vllm.model_executor.tuning.synthetic import PAPER_SHAPES, MoEShape, ragged_widths

HAS_VLLM = importlib.util.find_spec("vllm") is not None
SMALL_GPU = Gpu("two SMs", dram_bandwidth=1e9, l2_bandwidth=8e9, tensor_flops=2e12, sms=2)
TOY = MoEShape(num_experts=8, top_k=2, hidden_size=512, moe_intermediate_size=512)
TILES = LayerTiles(16, GemmTile(64, 64, 4, 4), GemmTile(64, 64, 4, 4), "test")
WIDE_TILES = LayerTiles(128, GemmTile(128, 64, 8, 4), GemmTile(256, 64, 8, 3), "test")

# E=128, N=704, H=2816, top-8 on an H200 with tuned tiles: tokens to microseconds, vLLM's pull request 44818
PUBLISHED = {64: 384.1, 128: 396.4, 256: 419.6, 512: 442.3, 1024: 528.4, 2048: 728.2, 4096: 1189.6}
PUBLISHED_SHAPE = MoEShape(128, 8, 2816, 704)


def grid(count: int, ctas_per_sm: int = 1, bytes_in_flight: float = 1e9, **values: float) -> Grid:
    """`count` equal CTAs, with one byte to read if nothing else is given."""
    defaults = {"prologue_s": 0.0, "dram_bytes": 0.0, "l2_bytes": 1.0, "tensor_s": 0.0, "serial_s": 0.0}
    arrays = {name: np.full(count, values.get(name, value)) for name, value in defaults.items()}
    return Grid(
        **arrays, epilogue_s=values.get("epilogue_s", 0.0), ctas_per_sm=ctas_per_sm, bytes_in_flight=bytes_in_flight
    )


def test_memory_bound_ctas_take_bytes_over_bandwidth() -> None:
    many = grid(64, ctas_per_sm=4, dram_bytes=1e6, l2_bytes=1e6)
    slow, fast = (simulate(many, replace(SMALL_GPU, dram_bandwidth=bandwidth)) for bandwidth in (1e9, 2e9))
    assert slow == pytest.approx(64e6 / 1e9) and fast == pytest.approx(slow / 2)
    through_l2 = grid(64, ctas_per_sm=4, l2_bytes=1e6)
    assert simulate(through_l2, SMALL_GPU) == pytest.approx(64e6 / 8e9)


def test_compute_bound_ctas_take_turns_on_their_sm() -> None:
    for ctas_per_sm in (1, 2, 4):
        assert simulate(grid(8, ctas_per_sm, tensor_s=1e-3), SMALL_GPU) == pytest.approx(4e-3)
    assert simulate(grid(8, 4, serial_s=1e-3), SMALL_GPU) == pytest.approx(1e-3)  # waits are shared, products are not


def test_waves_prologues_and_epilogues() -> None:
    phases = {"prologue_s": 2e-6, "serial_s": 5e-6, "epilogue_s": 3e-6}
    assert simulate(grid(4, 2, **phases), SMALL_GPU) == pytest.approx(10e-6)
    assert simulate(grid(5, 2, **phases), SMALL_GPU) == pytest.approx(20e-6)  # one more than there are slots
    idle = grid(5, 2, prologue_s=2e-6, l2_bytes=0.0, epilogue_s=3e-6)
    assert simulate(idle, SMALL_GPU) == pytest.approx(4e-6)  # neither main loop nor epilogue


def test_one_cta_is_as_fast_as_its_requests_in_flight() -> None:
    alone = grid(1, bytes_in_flight=100.0, dram_bytes=1000.0, l2_bytes=1000.0)
    assert simulate(alone, SMALL_GPU) == pytest.approx(10 * SMALL_GPU.dram_latency_s)
    cached = grid(1, bytes_in_flight=100.0, l2_bytes=1000.0)
    assert simulate(cached, SMALL_GPU) == pytest.approx(10 * SMALL_GPU.l2_latency_s)


def test_who_runs_beside_whom_changes_shares() -> None:
    """The shorter of two readers leaves the memory to the longer one."""
    two = replace(grid(2), dram_bytes=np.array([1e6, 3e6]), l2_bytes=np.array([1e6, 3e6]))
    assert simulate(two, SMALL_GPU) == pytest.approx(4e-3)
    cached = replace(grid(2), dram_bytes=np.array([1e6, 0]), l2_bytes=np.array([1e6, 4e6]))
    assert simulate(cached, SMALL_GPU) == pytest.approx(1e-3)  # reading from L2 takes nothing of the memory's bandwidth


def test_grids_are_checked() -> None:
    with pytest.raises(ValueError, match="different lengths: \\[2, 3\\]"):
        replace(grid(2), serial_s=np.zeros(3))


def test_blocks() -> None:
    blocks = Blocks.build(np.array([5, 0, 1, 8]), 4, 4)
    assert blocks.expert.tolist() == [0, 0, 2, 3, 3] and blocks.routes.tolist() == [4, 1, 1, 4, 4]
    assert blocks.first.tolist() == [True, False, True, True, False]
    assert blocks.idle == -(-(14 + 4 * 3) // 4) - 5
    assert Blocks.build(np.array([1, 0, 1, 0]), 16, 4).idle == 0  # two routes, at most two blocks
    single = Blocks.one_route_each(np.array([0, 2, 1]))
    assert single.expert.tolist() == [1, 1, 2] and single.first.all() and single.idle == 0


def test_routing_counts_every_route() -> None:
    for tokens, draws in ((1, 8), (64, 8), (256, 2), (4096, 1)):
        counts = route_counts(16, 4, tokens)
        assert len(counts) == draws and {int(count.sum()) for count in counts} == {4 * tokens}
        assert max(int(count.max()) for count in counts) <= tokens  # no token picks an expert twice


def test_up_reads_every_weight_once_and_skips_what_is_not_stored() -> None:
    widths = np.array([512, 320, 0])
    blocks = Blocks.build(np.array([20, 3, 2]), 16, 3)
    fused, stock = (up_grid(code, blocks, widths, 256, SMALL_GPU, TILES) for code in (AFTER, STOCK))
    assert fused.dram_bytes.sum() == stock.dram_bytes.sum() == 2 * (512 + 320) * 256 * 2
    assert len(fused) == (4 + blocks.idle) * 8 and len(stock) == (4 + blocks.idle) * 16
    assert np.count_nonzero(fused.l2_bytes) == 2 * 8 + 5
    assert fused.tensor_s.sum() > 2 * 32 * 2 * 832 * 256 / 2e12


@pytest.mark.parametrize("code", [STOCK, BEFORE, AFTER])
@pytest.mark.parametrize("tokens", [1, 16, 512])
def test_no_faster_than_memory_and_tensor_cores_allow(code: Code, tokens: int) -> None:
    widths = [512, 448, 384, 320, 256, 192, 128, 64] if code is not STOCK else [512] * 8
    gpu = GPUS["H200"]
    hit = np.mean([np.dot(counts > 0, np.sort(widths)[::-1]) for counts in route_counts(8, 2, tokens)])
    routed = np.mean([np.dot(counts, np.sort(widths)[::-1]) for counts in route_counts(8, 2, tokens)])
    time = predict(code, TOY, widths, tokens, gpu, WIDE_TILES)
    for least in (time, chained(time)):
        assert least.total > 3 * 512 * hit * 2 / gpu.dram_bandwidth
        assert least.total > 6 * 512 * routed / gpu.tensor_flops


def test_limits() -> None:
    """Almost all time is memory's with few tokens and slow memory, and the tensor cores' with many tokens."""
    slow_memory = replace(GPUS["H200"], dram_bandwidth=1e10)
    widths = [512] * 8
    one, two = (
        predict(AFTER, TOY, widths, 16, replace(slow_memory, dram_bandwidth=bandwidth), TILES).total
        for bandwidth in (1e10, 2e10)
    )
    assert 1.8 < one / two < 2
    slow_cores = replace(GPUS["H200"], tensor_flops=1e13)
    flops = 6 * 512 * 512 * 2 * 8192
    share = flops / 1e13 / predict(AFTER, TOY, widths, 8192, slow_cores, WIDE_TILES).total
    assert 0.55 < share < 0.66  # the part of their peak that a main loop reaches, less tails and padded rows


def test_stock_pays_for_its_activation_and_all_for_combine() -> None:
    gpu = GPUS["H200"]
    stock, ours = (predict(code, TOY, [512] * 8, 16384, gpu, WIDE_TILES) for code in (STOCK, AFTER))
    routes, boundary = 2 * 16384, 1e-6
    assert ours.activation == 0 and stock.combine == ours.combine
    assert stock.activation == pytest.approx(boundary + 3 * 512 * routes * 2 / gpu.dram_bandwidth)
    assert stock.combine == pytest.approx(boundary + 512 * (routes + 16384) * 2 / gpu.dram_bandwidth)


@pytest.mark.parametrize("code", [BEFORE, AFTER])
@pytest.mark.parametrize("tokens", [2, 8, 64, 512])
def test_more_pruning_is_never_slower(code: Code, tokens: int) -> None:
    moe = MoEShape(16, 4, 1024, 1024)
    times = [
        predict(code, moe, ragged_widths(16, 1024, sparsity), tokens, GPUS["H200"], TILES).total
        for sparsity in (0.0, 0.125, 0.25, 0.5, 0.75)
    ]
    assert times == sorted(times, reverse=True) and times[-1] < 0.85 * times[0]


def test_what_each_change_is_worth() -> None:
    """Every difference between the versions costs time where it should."""
    widths, gpu = [512] * 8, GPUS["H200"]

    def total(code: Code, tokens: int, tiles: LayerTiles) -> float:
        return predict(code, TOY, widths, tokens, gpu, tiles).total

    for change in (
        {"extra_experts": 400},
        {"idle_cta_s": 9e-6},
        {"dependent_loads": 4},
        {"mapping_launches": 2},
        {"combine_s": 1e-6},
        {"scalar_down": True},
        {"up_element_s": 22e-9},
        {"fused": False},
    ):
        assert total(replace(AFTER, **change), 64, TILES) > 1.01 * total(AFTER, 64, TILES), change
    blocks, full = Blocks.build(np.array([40]), 16, 1), np.array([512])
    for tiles, slower in ((TILES, 1), (WIDE_TILES, 1.075)):  # mma.sync has no wide form
        one, two = (up_grid(replace(AFTER, products=products), blocks, full, 512, gpu, tiles) for products in (1, 2))
        assert two.tensor_s.sum() == pytest.approx(slower * one.tensor_s.sum())
    assert total(replace(AFTER, products=2), 4096, WIDE_TILES) > total(AFTER, 4096, WIDE_TILES)
    assert total(replace(AFTER, scalar_down=True), 4096, WIDE_TILES) > 1.1 * total(AFTER, 4096, WIDE_TILES)
    after = predict(AFTER, TOY, widths, 1, gpu, TILES)
    assert 1e-6 < after.total - chained(after).total < 5e-6


# rows, columns (of both matrices), tile, CTAs on an SM: from ptxas for sm_90a, stock's kernels first
@pytest.mark.parametrize(
    ("block_m", "columns", "tile", "expected"),
    [
        (16, 64, GemmTile(64, 64, 4, 5), 5),
        (16, 64, GemmTile(64, 128, 4, 3), 5),
        (16, 64, GemmTile(64, 128, 4, 4), 3),
        (16, 256, GemmTile(256, 128, 8, 2), 2),
        (64, 128, GemmTile(128, 64, 4, 3), 3),
        (128, 256, GemmTile(256, 64, 8, 4), 1),
        (16, 64, GemmTile(32, 128, 4, 4), 3),
        (64, 128, GemmTile(64, 64, 4, 4), 2),
        (64, 128, GemmTile(128, 64, 4, 4), 2),
        (128, 256, GemmTile(256, 64, 8, 3), 1),
        (16, 64, GemmTile(64, 64, 4, 4), 7),
    ],
)
def test_residency_is_that_of_the_compiled_kernels(block_m: int, columns: int, tile: GemmTile, expected: int) -> None:
    assert residency(block_m, columns, tile)[0] == expected


def test_stock_defaults_are_vllms() -> None:
    fused_moe = pytest.importorskip("vllm.model_executor.layers.fused_moe.fused_moe")
    for tokens in (1, 32, 33, 64, 65, 96, 97, 128, 129, 512, 513, 8192):
        theirs = fused_moe.get_default_config(tokens, 64, 1408, 2048, 6, None)
        ours = stock_defaults(tokens)
        assert ours == {key: theirs[key] for key in ours}


def test_stock_takes_the_nearest_entry_of_its_file() -> None:
    assert stock_tiles(TOY, 8).source == "vLLM's defaults" and len(stock_candidates(TOY, 8)) > HAS_VLLM
    if HAS_VLLM:
        qwen = PAPER_SHAPES["Qwen3-30B-A3B"]
        assert stock_tiles(qwen, 1200) == stock_tiles(qwen, 1024) != stock_tiles(qwen, 512)
        assert stock_tiles(qwen, 1, "NVIDIA_H100_80GB_HBM3").source == "vLLM's defaults"
        assert stock_candidates(qwen, 8) == [stock_tiles(qwen, 8)]


@pytest.mark.skipif(not HAS_VLLM, reason="takes the tiles that vLLM ships")
def test_published_times() -> None:
    """0 to 18 % optimistic; that shape's own tiles are not published, those of the next width are taken."""
    near = PUBLISHED_SHAPE._replace(moe_intermediate_size=768)
    for tokens, published in PUBLISHED.items():
        tiles = stock_tiles(near, tokens)
        assert tiles.source == "vLLM's NVIDIA_H200 file"
        predicted = 1e6 * predict(STOCK, PUBLISHED_SHAPE, [704] * 128, tokens, GPUS["H200"], tiles).total
        assert 0.82 < predicted / published < 1, f"{tokens} tokens: {predicted:.0f} for {published} us"


@pytest.mark.skipif(not HAS_VLLM, reason="takes the tiles that vLLM ships")
def test_where_the_old_kernels_lose() -> None:
    """At 25 %: at one token on small shapes and at 256 and 1024 on Qwen3. In between and with wide experts they win."""

    def speedup(shape: str, tokens: int) -> float:
        before = layer_model.predict_ours(shape, "H200", tokens, 0.25)[0]
        assert before.arm == "before"
        return layer_model.predict_stock(shape, "H200", tokens).time.total / before.time.total

    for tokens in (1, 256, 1024):
        assert 0.8 < speedup("Qwen3-30B-A3B", tokens) < 1
    assert 0.7 < speedup("DeepSeekMoE-16B", 1) < 1
    for shape, tokens in (("Qwen3-30B-A3B", 64), ("DeepSeekMoE-16B", 256), ("Qwen2-57B-A14B", 8)):
        assert 1.1 < speedup(shape, tokens) < 4 / 3


def test_old_tiles() -> None:
    moe = PAPER_SHAPES["Qwen3-30B-A3B"]
    assert [tiles_before(moe, [768] * 128, tokens).block_m for tokens in (256, 257, 512, 513, 1024, 1025)] == [
        16,
        32,
        32,
        64,
        64,
        128,
    ]


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr("sys.argv", ["layer_model", *arguments])
    layer_model.main()


def test_command_writes_its_rows_and_replaces_only_them(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    path = tmp_path / "rows.csv"
    arguments = ("--shape", "tiny", "--tokens", "1", "64", "--csv", str(path))
    run(monkeypatch, *arguments)
    run(monkeypatch, *arguments)
    rows = list(csv.DictReader(path.open()))
    assert len(rows) == 2 * 2 * 3 * 5  # devices, token counts, sparsities, arms
    assert [row["arm"] for row in rows[:5]] == ["vllm", "vllm tuned", "before", "after", "after, chained"]
    for row in rows:
        stock = next(other for other in rows if all(other[key] == row[key] for key in ("gpu", "tokens", "sparsity")))
        ratio = float(stock["microseconds"]) / float(row["microseconds"])
        assert stock["arm"] == "vllm" and float(row["speedup"]) == pytest.approx(ratio, rel=0.02)
        parts = sum(float(row[name]) for name in ("up_us", "down_us", "other_us"))
        assert parts == pytest.approx(float(row["microseconds"]), abs=0.2)
        assert row["date"] and row["command"] and row["tiles"] and row["tiles_from"]
    assert "tiny, H100, 64 tokens, 50% pruned" in capsys.readouterr().out
    other = tmp_path / "measured.csv"
    other.write_text("shape,arm\n")
    with pytest.raises(SystemExit):
        run(monkeypatch, "--shape", "tiny", "--csv", str(other))
    assert other.read_text() == "shape,arm\n"


def test_against_measured_rows(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Rows of `moe_layer` itself, their GPU and baseline made up."""
    measured = tmp_path / "here.csv"
    monkeypatch.setattr(
        "sys.argv",
        [
            "moe_layer",
            "--shape",
            "tiny",
            "--tune-seconds",
            "0",
            "--tokens",
            "1",
            "--sparsity",
            "0.25",
            "--csv",
            str(measured),
        ],
    )
    moe_layer.main()
    ours = list(csv.DictReader(measured.open()))
    assert [row["arm"] for row in ours] == ["heapr unpruned", "heapr 25% pruned"]
    ours[1] |= {"microseconds": "10.0", "vs_baseline": "0.8", "baseline": moe_layer.TUNED}
    gpu, absent = {"device": "NVIDIA H200, NVIDIA H200"}, {"device": "NVIDIA B200"}
    rows = [
        row | gpu
        for row in (
            *ours,
            ours[0] | {"arm": "vllm"},
            ours[1] | {"arm": moe_layer.TUNED},
            ours[0] | {"arm": "flashinfer_cutlass"},
            ours[0] | {"shape": "other"},
        )
    ]
    path = tmp_path / "measured.csv"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=ours[0])
        writer.writeheader()
        writer.writerows([*rows, ours[0] | absent])
    capsys.readouterr()
    run(monkeypatch, "--against", str(path))
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 5 and lines[-1] == "3 rows are left out: other arms, shapes or devices"
    assert "tiny, NVIDIA H200, NVIDIA H200, 1 tokens, heapr 25% pruned: measured 10.0 us x1.25; predicted" in lines[1]
    found = layer_model.compare(rows)
    predicted = {row["arm"]: row for row in layer_model.table("tiny", "H200", 1, 0.25)}
    assert list(found[1]["predicted"]) == ["before", "after", "after, chained"]
    for arm, microseconds in found[1]["predicted"].items():
        assert round(microseconds, 1) == predicted[arm]["microseconds"]
        assert found[1]["predicted_speedup"][arm] == pytest.approx(predicted[arm]["speedup_over_tuned"], abs=1e-3)
    assert found[0]["speedup"] is None and not found[0]["predicted_speedup"]  # measured without vLLM
    assert list(found[2]["predicted"]) == ["vllm"] and list(found[3]["predicted"]) == ["vllm tuned"]


@pytest.mark.skipif(not HAS_VLLM, reason="takes the tiles that vLLM ships")
def test_measured_arms_of_vllm_get_the_tiles_that_they_ran() -> None:
    def tiles(arm: str, device: str) -> LayerTiles:
        return layer_model.predict_measured(arm, "Qwen3-30B-A3B", device, 64)[0].tiles

    assert tiles("vllm", "NVIDIA H100 80GB HBM3").source == "vLLM's defaults"  # no bf16 file for it
    assert tiles("vllm H200 file", "NVIDIA H100 80GB HBM3") == tiles("vllm", "NVIDIA H200")
    assert tiles("vllm zeroed 25%", "NVIDIA H200") == tiles("vllm tuned", "NVIDIA H200")
    assert layer_model.predict_measured("vllm tuned, uniformly 25% narrower", "Qwen3-30B-A3B", "NVIDIA H200", 64) == []
