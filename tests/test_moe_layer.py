# SPDX-License-Identifier: Apache-2.0
"""`benchmarks.moe_layer` at a size for Triton's interpreter, with torch in place of the opponents' GPU kernels."""

import csv
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from benchmarks import moe_layer, plot_moe_layer, stock_moe
from benchmarks.roofline import Peaks, work
from heapr_vllm.model_executor.synthetic import Batch, MoEShape

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the GPU runs the benchmark itself")


def torch_moe(layer: stock_moe.UniformLayer, batch: Batch, copy: int = 0) -> torch.Tensor:
    """A loop over experts in the layout that vLLM's kernel takes."""
    output = torch.zeros_like(batch.x, dtype=torch.float32)
    for expert, (w1, w2) in enumerate(zip(layer.w1[copy % 2], layer.w2[copy % 2], strict=True)):
        gate, up = F.linear(batch.x, w1).float().chunk(2, -1)
        weight = (batch.topk_weights * (batch.topk_ids == expert)).sum(-1, keepdim=True)
        output += weight * F.linear((F.silu(gate) * up).to(w2.dtype), w2)
    return output.to(batch.x.dtype)


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr("sys.argv", ["moe_layer", "--shape", "tiny", "--tune-seconds", "0", *arguments])
    moe_layer.main()


def test_rows_and_picture(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(stock_moe, "why_missing", lambda: None)
    monkeypatch.setattr(stock_moe.UniformLayer, "vllm", torch_moe)
    monkeypatch.setattr(moe_layer.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(stock_moe.UniformLayer, "flashinfer", lambda self, batch, copy=0: batch.x)  # wrong
    table = tmp_path / "rows.csv"
    run(monkeypatch, "--tokens", "1", "5", "--csv", str(table))
    rows = list(csv.DictReader(table.open()))
    assert [(row["tokens"], row["arm"]) for row in rows] == [
        (tokens, arm) for tokens in ("1", "5")
        for arm in ("vllm", "heapr unpruned", "heapr 25% pruned", "heapr 50% pruned")]
    assert "flashinfer_cutlass is left out: its output is off by" in capsys.readouterr().out
    for row in rows:
        assert float(row["microseconds"]) > 0 and 0 < float(row["roofline"]) < 1
        assert row["versions"] and row["device"] and row["command"] and row["date"]
    assert {row["kept"] for row in rows} == {"1.0", "0.75", "0.5"}
    run(monkeypatch, "--tokens", "1", "--sparsity", "0.5", "--csv", str(table))
    rows = list(csv.DictReader(table.open()))
    plot_moe_layer.plot(rows, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    arms = plot_moe_layer.curves(rows)["tiny"]
    assert [tokens for tokens, _ in arms["vllm"]] == [1, 5] and arms["vllm"][0][1] == float(rows[-3]["vs_baseline"])


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
