# SPDX-License-Identifier: Apache-2.0
"""`benchmarks.moe_layer` at a size for Triton's interpreter, with torch in place of the opponents' GPU kernels."""

import csv
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from benchmarks import moe_layer, plot_moe_layer, stock_moe
from benchmarks.roofline import Peaks, work
from heapr_vllm.model_executor.tuning.synthetic import PAPER_SHAPES, Batch, MoEShape, SyntheticLayer, random_batch

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(torch.cuda.is_available(), reason="the GPU runs the benchmark itself"),
]


def torch_moe(layer: stock_moe.UniformLayer, batch: Batch, copy: int = 0) -> torch.Tensor:
    """A loop over experts in the layout that vLLM's kernel takes."""
    output = torch.zeros_like(batch.x, dtype=torch.float32)
    for expert, (w1, w2) in enumerate(zip(layer.w1[copy % 2], layer.w2[copy % 2], strict=True)):
        gate, up = F.linear(batch.x, w1).float().chunk(2, -1)
        weight = (batch.topk_weights * (batch.topk_ids == expert)).sum(-1, keepdim=True)
        output += weight * F.linear((F.silu(gate) * up).to(w2.dtype), w2)
    return output.to(batch.x.dtype)


def fake_configs(monkeypatch: pytest.MonkeyPatch) -> list[stock_moe.Config]:
    """In place of `stock_moe.using`: what it was given, each once."""
    taken: list[stock_moe.Config] = []

    @contextmanager
    def using(config: stock_moe.Config | None) -> Iterator[None]:
        if config and config not in taken:
            taken.append(config)
        yield

    monkeypatch.setattr(stock_moe, "using", using)
    return taken


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr("sys.argv", ["moe_layer", "--shape", "tiny", "--tune-seconds", "0", *arguments])
    moe_layer.main()


def test_rows_and_picture(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(stock_moe, "why_missing", lambda: None)
    monkeypatch.setattr(stock_moe.UniformLayer, "vllm", torch_moe)
    monkeypatch.setattr(stock_moe, "h200_config", lambda layer, tokens: {"BLOCK_SIZE_M": 16} if tokens == 5 else None)
    taken = fake_configs(monkeypatch)
    monkeypatch.setattr(moe_layer.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(stock_moe.UniformLayer, "flashinfer", lambda self, batch, copy=0: batch.x)  # wrong
    table = tmp_path / "rows.csv"
    run(monkeypatch, "--tokens", "1", "5", "--csv", str(table))
    rows = list(csv.DictReader(table.open()))
    assert [(row["tokens"], row["arm"]) for row in rows] == [
        (tokens, arm)
        for tokens, stock in (("1", ("vllm",)), ("5", ("vllm", "vllm H200 file")))
        for arm in (
            *stock,
            "vllm zeroed 25%",
            "vllm zeroed 50%",
            "heapr unpruned",
            "heapr 25% pruned",
            "heapr 50% pruned",
        )
    ]
    assert taken == [{"BLOCK_SIZE_M": 16}]
    assert "flashinfer_cutlass is left out: its output is off by" in capsys.readouterr().out
    for row in rows:
        assert float(row["microseconds"]) > 0 and float(row["roofline"]) > 0
        assert row["versions"] and row["device"] and row["command"] and row["date"]
        assert 0 < float(row["experts_hit"]) <= 8 and 0 < float(row["kept_routed"]) <= 1
        if row["arm"].endswith(" pruned"):
            assert float(row["kept_routed"]) < 1 and row["kept"] == ("0.75" if "25%" in row["arm"] else "0.5")
        else:  # zeroed weights are stored and executed
            assert row["kept"] == row["kept_routed"] == "1.0"
        assert row["arm"] != "heapr unpruned" or row["vs_unpruned"] == "1.0"
    run(monkeypatch, "--tokens", "1", "--sparsity", "0.5", "--csv", str(table))
    rows = list(csv.DictReader(table.open()))
    plot_moe_layer.plot(rows, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    arms = plot_moe_layer.curves(rows)["tiny"]
    assert [tokens for tokens, _ in arms["vllm"]] == [1, 5] and arms["vllm"][0][1] == float(rows[-4]["vs_baseline"])


def test_quantized_arms(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(stock_moe, "why_missing", lambda: "no GPU")
    table = tmp_path / "rows.csv"
    run(monkeypatch, "--tokens", "5", "--sparsity", "0.5", "--quantize", "int4", "int8-a8", "--csv", str(table))
    floors = {row["arm"]: float(row["floor_us"]) for row in csv.DictReader(table.open())}
    assert list(floors) == [
        f"heapr {amount}{kind}" for kind in ("", " int4", " int8-a8") for amount in ("unpruned", "50% pruned")
    ]
    assert floors["heapr unpruned int4"] <= floors["heapr unpruned"], "fewer bytes, as many products"


def test_zeroed_weights_are_those_of_the_ragged_arm(monkeypatch: pytest.MonkeyPatch) -> None:
    """Width 0 included; one pruned neuron that is not zero, or one kept neuron that is, and the arm is left out."""
    monkeypatch.setattr(stock_moe.UniformLayer, "vllm", torch_moe)
    moe, device = MoEShape(3, 3, 64, 192), torch.device("cpu")
    layer = SyntheticLayer.build(moe, [128, 0, 192], torch.float32, device, copies=2)
    full = moe_layer.as_uniform(layer)
    batch = random_batch(5, moe, torch.float32, device)
    expected = layer.expected(batch)
    arm = moe_layer.Arm("vllm zeroed", [192] * 3, full.vllm, 0.5)
    assert full.w1[0].shape == (3, 384, 64) and full.w2[0].shape == (3, 64, 192)
    assert [int((weight != 0).any(0).sum()) for weight in full.w2[1]] == layer.widths
    assert [int((weight != 0).any(1).sum()) for weight in full.w1[1]] == [2 * width for width in layer.widths]
    torch.testing.assert_close(full.vllm(batch), expected)
    for expert, pruned in ((1, True), (2, False)):
        w1, w2 = full.w1[0][expert].clone(), full.w2[0][expert].clone()
        full.w1[0][expert], full.w2[0][expert] = (torch.randn_like(w1), torch.randn_like(w2)) if pruned else (0, 0)
        assert not moe_layer._is_right(arm, batch, expected)
        full.w1[0][expert], full.w2[0][expert] = w1, w2
    assert moe_layer._is_right(arm, batch, expected)


def test_the_h200_file_where_this_gpu_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """The search starts from it, and candidates are those nearest to it."""
    pytest.importorskip("vllm")
    default = {
        "BLOCK_SIZE_M": 64,
        "BLOCK_SIZE_N": 64,
        "BLOCK_SIZE_K": 64,
        "GROUP_SIZE_M": 1,
        "SPLIT_K": 1,
        "num_warps": 4,
        "num_stages": 2,
    }
    monkeypatch.setattr(stock_moe, "shipped_config", lambda layer, tokens: default)
    for name in ("Qwen3-30B-A3B", "Qwen2-57B-A14B", "DeepSeekMoE-16B"):
        moe = PAPER_SHAPES[name]._replace(hidden_size=1)
        layer = stock_moe.UniformLayer.build(moe, moe.moe_intermediate_size, torch.float16, torch.device("cpu"), 1)
        config = stock_moe.h200_config(layer, 60)
        if name == "DeepSeekMoE-16B":  # vLLM ships none
            assert config is None and stock_moe.known_configs(layer, 60) == [default]
            continue
        assert config["BLOCK_SIZE_M"] and config != default and stock_moe.known_configs(layer, 60) == [default, config]
        nearest = stock_moe.candidates(layer, 60)[0]
        assert sum(nearest[key] == config.get(key) for key in nearest) > len(default) / 2
        monkeypatch.setattr(stock_moe, "shipped_config", lambda layer, tokens, config=config: config)
        assert stock_moe.h200_config(layer, 60) is None
        monkeypatch.setattr(stock_moe, "shipped_config", lambda layer, tokens: default)


def test_without_opponents_ours_still_run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    run(monkeypatch, "--tokens", "1", "--sparsity", "0.25")
    output = capsys.readouterr().out
    assert "stock vLLM is left out: no GPU" in output and "heapr 25% pruned" in output


def test_a_missing_activation_is_filled_in() -> None:
    """In a process of its own: the op may exist here."""
    script = """if True:
        import torch
        from benchmarks.stock_moe import _provide_activation
        assert not hasattr(torch.ops._C, "silu_and_mul")
        library = _provide_activation("CPU")
        x, out = torch.randn(5, 8), torch.empty(5, 4)
        torch.ops._C.silu_and_mul(out, x)
        torch.testing.assert_close(out, torch.nn.functional.silu(x[:, :4]) * x[:, 4:])
    """
    subprocess.run([sys.executable, "-c", script], check=True)


def test_floor_counts_each_expert_hit_once() -> None:
    moe = MoEShape(3, 2, 8, 64)
    x = torch.zeros(4, 8, dtype=torch.float16)
    batch = Batch(x, torch.ones(4, 2), torch.tensor([[0, 1]] * 4, dtype=torch.int32))
    todo = work(moe, [64, 32, 64], [batch])
    assert todo.bytes == 3 * 8 * (64 + 32) * 2 + 2 * x.nbytes
    assert todo.flops == 4 * 6 * 8 * (64 + 32) and todo.routed_width == 48 and todo.experts == 2
    assert todo.floor(Peaks(todo.bytes, todo.flops / 3)) == 3
