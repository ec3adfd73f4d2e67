# SPDX-License-Identifier: Apache-2.0
"""`heapr tune` on a layer small enough for Triton's interpreter; its candidates for the paper's models."""

import importlib.util
import itertools
import json
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from heapr_vllm.cli.main import main
from heapr_vllm.errors import HeaprError
from heapr_vllm.formats.quantized import ExpertScheme
from heapr_vllm.formats.served_scheme import CALIBRATION_FILE
from heapr_vllm.model_executor.kernels.triton import tuned_files
from heapr_vllm.model_executor.kernels.triton.launch import triton_ragged_moe
from heapr_vllm.model_executor.kernels.triton.tiles import LayerShape, Tile, default_config, use_one_route_blocks
from heapr_vllm.model_executor.kernels.triton.tuned_files import choose_config, device_name
from heapr_vllm.model_executor.tuning import search
from heapr_vllm.model_executor.tuning.jobs import Job, jobs_of_model, jobs_of_shapes, with_rounded_activations
from heapr_vllm.model_executor.tuning.synthetic import (
    PAPER_SHAPES,
    MoEShape,
    SyntheticLayer,
    ragged_widths,
    random_batch,
)

JOB = Job(MoEShape(3, 1, 64, 128), (64, 128, 0), torch.float16)
TILES = [Tile(16, 64), Tile(32, 64), Tile(64, 64)]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty HEAPR_CONFIG_FOLDER, and three candidates per GEMM."""
    monkeypatch.setenv("HEAPR_CONFIG_FOLDER", str(tmp_path))
    monkeypatch.setattr(search, "candidates", lambda *_: TILES)
    tuned_files._tuned.cache_clear()
    yield tmp_path
    tuned_files._tuned.cache_clear()


def results(folder: Path) -> dict[str, dict]:
    """Token count to entry of the only profile of the only file."""
    (path,) = folder.glob("*.json")
    (profile,) = json.loads(path.read_text())["profiles"]
    return profile["tokens"]


def test_the_plugin_uses_what_was_tuned(folder: Path) -> None:
    (path,), missing = search.tune([JOB], [1, 40], folder, 60)
    assert not missing
    assert path.name == "hidden_size=64,top_k=1,dtype=float16,device=cpu.json" or torch.cuda.is_available()
    assert set(results(folder)) == {"1", "40"}
    for tokens, entry in results(folder).items():
        config = choose_config(JOB.shape, int(tokens))
        assert entry["up"]["block_n"] == config.up.block_n and entry["microseconds"] > 0
        default = default_config(int(tokens), JOB.shape)
        assert (config.up, config.down) == (default.up, default.down) or {config.up, config.down} <= set(TILES)


@pytest.mark.parametrize("quantize", ["int8", "fp8", "int4"])
def test_tuning_for_experts_as_codes(quantize: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the command line, with real candidates, to what a layer of such experts is run with."""
    monkeypatch.undo()
    monkeypatch.setenv("HEAPR_CONFIG_FOLDER", str(folder))
    command = ["tune", "--shape", "tiny", "--sparsity", "0", "--tokens", "3", "--time-budget", "2s"]
    assert main([*command, "--quantize", quantize, "--dtype", "float16"]) == 0
    (job,) = jobs_of_shapes(["tiny"], [0], torch.float16, quantize=quantize)
    (path,) = folder.glob("*.json")
    assert path.name == job.shape.file_name(device_name()) and f"experts={quantize}_group" in path.name
    config = choose_config(job.shape, 3)
    config.check(job.shape)
    entry = results(folder)["3"]
    assert (entry["up"]["block_n"], entry["decode"]) == (config.up.block_n, config.decode)


def test_tuning_for_rounded_activations(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Into a file of their own, which layers of `triton_a8` read and others do not."""
    monkeypatch.undo()
    monkeypatch.setenv("HEAPR_CONFIG_FOLDER", str(folder))
    command = ["tune", "--shape", "tiny", "--sparsity", "0", "--tokens", "3", "--time-budget", "2s"]
    command += ["--dtype", "float16", "--round-activations"]
    assert main(command) == 2 and not list(folder.iterdir()), "of what experts?"
    assert main([*command, "--quantize", "int8"]) == 0
    (plain,) = jobs_of_shapes(["tiny"], [0], torch.float16, quantize="int8")
    (job,) = with_rounded_activations([plain])
    (path,) = folder.glob("*.json")
    assert path.name == job.shape.file_name(device_name()) != plain.shape.file_name(device_name())
    choose_config(job.shape, 3).check(job.shape)
    assert results(folder)["3"]["microseconds"] > 0


@pytest.mark.parametrize(
    ("dtype", "quantize", "message"),
    [
        (torch.float16, None, "for triton_a8: .*experts in 8 bits, not unquantized ones"),
        (torch.float16, "int4", "experts in 8 bits, not int4 ones"),
        (torch.float32, "int8", "computes in float32; choose triton; or drop --round-activations"),
        (torch.float16, "fp8", "does not multiply FP8"),
    ],
)
def test_what_cannot_be_rounded(
    dtype: torch.dtype, quantize: str | None, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU before compute capability 8.9."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 6))
    right = jobs_of_shapes(["tiny"], [0], torch.float16, quantize="int8")
    assert with_rounded_activations(right)
    with pytest.raises(HeaprError, match=message):
        with_rounded_activations(jobs_of_shapes(["tiny"], [0], dtype, quantize=quantize))
    with pytest.raises(HeaprError, match="groups of 128 at most, not of 256"):
        with_rounded_activations([replace(right[0], scheme=ExpertScheme(group_size=256))])


def test_shapes_that_the_kernel_does_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PAPER_SHAPES, "odd", MoEShape(4, 2, 96, 64))
    assert jobs_of_shapes(["odd"], [0], torch.float16, quantize="int8")
    with pytest.raises(HeaprError, match="for triton: int4 experts on GPUs need a hidden size in multiples of 64"):
        jobs_of_shapes(["odd"], [0], torch.float16, quantize="int4")


@pytest.mark.parametrize("quantize", ["int8", "fp8"])
@pytest.mark.parametrize("tokens", [1, 512, 8192])
def test_candidates_for_rounded_activations(quantize: str, tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search, "_has_hopper", lambda: True)
    jobs = jobs_of_shapes(["Qwen3-30B-A3B"], [0.25], torch.bfloat16, quantize=quantize)
    shape = with_rounded_activations(jobs)[0].shape
    default = default_config(tokens, shape, hopper=True)
    for block_m in search.block_sizes(shape, tokens):
        ups, downs = (search.candidates(kind, shape, block_m, tokens) for kind in ("up", "down"))
        assert len(ups) >= 4 and len(downs) >= 8
        for up, down in itertools.product(ups[:8], downs[:8]):
            replace(default, block_m=block_m, up=up, down=down).check(shape)
        for change in search.changes(shape, tokens):
            change(default).check(shape)


def test_both_decodes_are_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    fp8, int8 = (jobs_of_shapes(["tiny"], [0], torch.float16, quantize=name)[0].shape for name in ("fp8", "int8"))
    config = default_config(200, fp8)
    tried = {change(config).decode for change in search.changes(fp8, 200)}
    assert tried == {"bits", "cast"} - {config.decode} and not search.changes(int8, 200)
    monkeypatch.setattr(search, "gpu_has_e4m3", lambda: False)
    assert not search.changes(fp8, 200)


@pytest.mark.parametrize("quantize", ["int8", "fp8", "int4"])
@pytest.mark.parametrize("tokens", [1, 1024])
def test_candidates_of_codes(quantize: str, tokens: int) -> None:
    """Within groups; twice the accumulators where every step has sums of its own, since scales are not the weights'."""
    shape = jobs_of_shapes(["Qwen3-30B-A3B"], [0.25], torch.bfloat16, quantize=quantize)[0].shape
    for block_m in search.block_sizes(shape, tokens):
        scales_weights = quantize == "int4" and block_m >= 64
        for kind, halves in (("up", 2 if scales_weights else 4), ("down", 1)):
            tiles = search.candidates(kind, shape, block_m, tokens)
            assert len(tiles) > 3
            for tile in tiles:
                config = replace(default_config(tokens, shape), **{kind: tile})
                config.check(shape)
                assert halves * block_m * tile.block_n <= search.MAX_ACCUMULATORS * 32 * tile.num_warps


def test_candidates_in_groups_of_32() -> None:
    shape = LayerShape(96, 2, 8, 128, 192, torch.bfloat16, ExpertScheme.for_hidden_size("int8", 96))
    assert shape.group_size == 32
    assert {tile.block_k for tile in search.candidates("up", shape, 16, 8)} == {32}
    assert {tile.block_n for tile in search.candidates("down", shape, 16, 8)} == {16, 32}


@pytest.mark.parametrize(
    "scheme",
    [
        ExpertScheme("int", group_size=32),
        ExpertScheme("float", group_size=32),
        ExpertScheme("int", strategy="channel", group_size=None),
        ExpertScheme("float", strategy="channel", group_size=None),
        ExpertScheme(num_bits=4, group_size=32),
    ],
    ids=lambda scheme: f"{scheme.name}-{scheme.strategy}",
)
def test_a_synthetic_layer_of_codes(scheme: ExpertScheme) -> None:
    moe = MoEShape(3, 2, 64, 128)
    layer = SyntheticLayer.build(moe, [64, 128, 0], torch.float16, torch.device("cpu"), scheme=scheme)
    batch = random_batch(5, moe, torch.float16, torch.device("cpu"))
    output = torch.empty_like(batch.x)
    triton_ragged_moe(output, *layer.arguments(batch))
    torch.testing.assert_close(output, layer.expected(batch), rtol=2e-2, atol=2e-3)
    assert layer.shape.scheme == scheme and not layer.plain.w13.float().isnan().any()


@pytest.mark.parametrize(("kind", "limit"), [("int", 0.03), ("float", 0.2)])
def test_a_synthetic_layer_with_rounded_activations(kind: str, limit: float) -> None:
    """Limits are almost twice the largest of 40 draws."""
    moe, scheme = MoEShape(3, 2, 64, 128), ExpertScheme(kind, group_size=32)
    layer = SyntheticLayer.build(moe, [64, 128, 0], torch.float16, torch.device("cpu"), 1, scheme, activation_bits=8)
    batch = random_batch(5, moe, torch.float16, torch.device("cpu"))
    output = torch.empty_like(batch.x)
    triton_ragged_moe(output, *layer.arguments(batch), steps=layer.steps)
    expected = layer.expected(batch)
    assert 0 < (output - expected).norm() <= limit * expected.norm() and layer.shape.activation_bits == 8


def test_a_killed_run_continues(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fastest, calls = search.fastest, []

    def killed(layer, num_tokens: int, deadline: float):
        calls.append(num_tokens)
        if calls == [1, 2]:
            raise KeyboardInterrupt
        return fastest(layer, num_tokens, deadline)

    monkeypatch.setattr(search, "fastest", killed)
    with pytest.raises(KeyboardInterrupt):
        search.tune([JOB], [1, 2], folder, 60)
    first = results(folder)["1"]
    search.tune([JOB], [1, 2], folder, 60)
    assert calls == [1, 2, 2] and results(folder)["1"] == first and "2" in results(folder)
    assert search.tune([JOB], [1, 2], folder, 60) == ([], 0) and len(calls) == 3
    search.tune([JOB], [1], folder, 60, overwrite=True)
    assert calls[3:] == [1]


def test_without_time_nothing_is_written(folder: Path, capsys: pytest.CaptureFixture) -> None:
    assert search.tune([JOB], [1], folder, 0) == ([], 1) and not list(folder.iterdir())
    assert (
        main(
            [
                "tune",
                "--shape",
                "tiny",
                "--tokens",
                "1",
                "2",
                "--sparsity",
                "0",
                "--time-budget",
                "0s",
                "-o",
                str(folder),
            ]
        )
        == 0
    )
    assert "no time was left for 2 token counts" in capsys.readouterr().out


def test_without_gpu_and_interpreter_it_says_what_is_missing(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["tune", "--shape", "tiny"]) == 2
    assert "needs a GPU" in capsys.readouterr().err


@pytest.mark.parametrize("name", [name for name in PAPER_SHAPES if name != "tiny"])
@pytest.mark.parametrize("tokens", [1, 32, 1024, 8192, 65536])
def test_candidates_fit_the_layout_and_the_machine(name: str, tokens: int) -> None:
    moe = PAPER_SHAPES[name]
    shape = LayerShape.of(
        ragged_widths(moe.num_experts, moe.moe_intermediate_size, 0.25), moe.hidden_size, moe.top_k, torch.bfloat16
    )
    for block_m in search.block_sizes(shape, tokens):
        for kind in ("up", "down"):
            tiles = search.candidates(kind, shape, block_m, tokens)
            assert 8 <= len(tiles) == len(set(tiles)) <= search.MAX_CANDIDATES
            for tile in tiles:
                assert shape.hidden_size % (tile.block_k if kind == "up" else tile.block_n) == 0
                shared = tile.num_stages * tile.block_k * (block_m + (2 if kind == "up" else 1) * tile.block_n) * 2
                assert shared <= 227 * 1024
    default = default_config(tokens, shape, hopper=True)
    assert default.block_m in search.block_sizes(shape, tokens)


@pytest.mark.parametrize(("name", "width"), [("Qwen3-30B-A3B", 768), ("Qwen2-57B-A14B", 2560)])
def test_what_stock_vllm_was_tuned_to_is_tried(name: str, width: int) -> None:
    """The winners of the files that vLLM ships: the same tile for down, half as wide a tile of gate and up for up."""
    folder = Path(importlib.util.find_spec("vllm").origin).parent / "model_executor/layers/fused_moe/configs"
    moe = PAPER_SHAPES[name]
    shape = LayerShape.of(ragged_widths(moe.num_experts, width, 0.25), moe.hidden_size, moe.top_k, torch.bfloat16)
    file = json.loads((folder / f"E={moe.num_experts},N={width},device_name=NVIDIA_H200.json").read_text())
    winners = {int(tokens): entry for tokens, entry in file.items() if tokens.isdigit()}
    assert len(winners) >= 18
    for tokens, entry in winners.items():
        block_m, block_n, block_k = (entry[f"BLOCK_SIZE_{axis}"] for axis in "MNK")
        rest = (entry["num_warps"], entry["num_stages"], entry["GROUP_SIZE_M"])
        one_route = use_one_route_blocks(tokens, moe.top_k, moe.num_experts)
        assert block_m in search.block_sizes(shape, tokens)
        assert Tile(block_n // 2, block_k, *rest) in search.candidates("up", shape, block_m, tokens)
        assert one_route or Tile(block_n, 64, *rest) in search.candidates("down", shape, block_m, tokens)


def test_every_way_to_run_is_tried(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One after another, on top of the best so far; what a machine without Hopper cannot do is left out."""
    timed = []

    def pretend(calls: list, device: torch.device) -> Callable[[], float]:
        timed.append(calls[0].keywords["config"])
        return lambda: 1 / len(timed)  # every attempt is faster than the one before

    monkeypatch.setattr(search, "try_stopwatch", pretend)
    monkeypatch.setattr(search, "block_sizes", lambda *_: [])
    monkeypatch.setattr(search, "_has_hopper", lambda: True)
    layer = SyntheticLayer.build(MoEShape(16, 2, 64, 64), [64] * 16, torch.float16, torch.device("cpu"))
    config, _ = search.fastest(layer, 2, time.monotonic() + 60)
    assert config == timed[-1] and not config.fused and config.chained and config.prefetch
    assert config.one_route is False and not config.up.tma, "tma of up needs fused"
    assert [config for config in timed if config.down.tma] and not config.down.tma, "prefetch reads w2 by pointers"
    monkeypatch.setattr(search, "_has_hopper", lambda: False)
    config, _ = search.fastest(layer, 2, time.monotonic() + 60)
    assert not config.chained and not config.down.tma


def test_jobs_of_a_model(masks_repository: Path, tmp_path: Path) -> None:
    (whole,) = jobs_of_model(masks_repository)
    assert whole.moe[1:3] == (2, 64) and whole.dtype == torch.float32, "from config.json"
    assert all(width % 64 == 0 for width in whole.widths) and 0 in whole.widths
    (half,) = jobs_of_model(masks_repository, torch.bfloat16, tp_size=2)
    assert sum(half.widths) < sum(whole.widths) and half.dtype == torch.bfloat16
    (codes,) = jobs_of_model(masks_repository, quantize="fp8")
    assert codes.scheme == ExpertScheme("float", group_size=64) and codes.dtype == torch.float32
    config = json.loads((masks_repository / "config.json").read_text())
    config["quantization_config"] = {**config.get("quantization_config", {}), "experts": ExpertScheme().to_dict()}
    stored = shutil.copytree(masks_repository, tmp_path / "stored")
    (stored / "config.json").write_text(json.dumps(config))
    assert jobs_of_model(stored)[0].scheme == ExpertScheme(), "as the model's experts are stored"
    (nibbles,) = jobs_of_model(masks_repository, quantize="int4")
    assert nibbles.scheme == ExpertScheme(num_bits=4, group_size=64)
    inner = {"quant_method": "fp8", "weight_block_size": [32, 32]}
    config["quantization_config"] |= {"experts": None, "inner": inner}
    (stored / "config.json").write_text(json.dumps(config))
    assert jobs_of_model(stored)[0].scheme is None, "the base model's experts have four bytes per weight"
    record = json.loads((stored / "heapr" / CALIBRATION_FILE).read_text())
    record["routed_bytes"] = record["routed_weights"] * 5 // 4
    (stored / "heapr" / CALIBRATION_FILE).write_text(json.dumps(record))
    assert jobs_of_model(stored)[0].scheme == ExpertScheme("float", group_size=32), "as the base model stores them"
    assert jobs_of_model(stored, quantize="none")[0].scheme is None
    (stored / "heapr" / CALIBRATION_FILE).unlink()
    with pytest.raises(HeaprError, match="does not say whether the experts.*--quantize int8"):
        jobs_of_model(stored)
    assert jobs_of_model(stored, quantize="fp8")[0].scheme == ExpertScheme("float", group_size=64)
    (stored / "config.json").write_text(json.dumps({**config, "hidden_size": 96}))
    with pytest.raises(HeaprError, match="int4 experts on GPUs need a hidden size in multiples of 64, not 96"):
        jobs_of_model(stored, quantize="int4")
    with pytest.raises(HeaprError, match="unknown shape 'nope'; choose from Qwen3-30B-A3B"):
        jobs_of_shapes(["nope"], [0.25], torch.bfloat16)
    with pytest.raises(HeaprError, match="heapr prune"):
        jobs_of_model(masks_repository.parent)


@pytest.mark.parametrize("sparsity", [0.1, 0.25, 0.5, 0.9])
def test_ragged_widths_have_the_wanted_mean(sparsity: float) -> None:
    widths = ragged_widths(128, 768, sparsity)
    assert abs(sum(widths) - 128 * 768 * (1 - sparsity)) <= 64 + 1
    assert all(width % 64 == 0 and 0 <= width <= 768 for width in widths) and len(set(widths)) > 4
    assert ragged_widths(128, 768, sparsity) == widths != ragged_widths(128, 768, sparsity, seed=1)
