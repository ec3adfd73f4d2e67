# SPDX-License-Identifier: Apache-2.0
"""`benchmarks.cpu_layer` at a small size."""

import csv
from pathlib import Path

import pytest
import torch

pytest.importorskip("vllm")
from benchmarks import cpu_layer
from heapr_vllm.model_executor.kernels.base import ExpertRows
from heapr_vllm.model_executor.kernels.cpu_compiled import build, extension
from heapr_vllm.model_executor.storage.layout import RaggedLayout


def test_rows(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    sizes = "--experts 4 --top-k 2 --hidden 64 --width 96 --tokens 1 5 --threads 1 --rounds 2"
    arms = "--sparsity 0.5 --buckets 1 4 --quantize int8 fp8 int4 --copies 2"
    arguments = [*sizes.split(), *arms.split(), "--csv", str(tmp_path / "rows")]
    monkeypatch.setattr("sys.argv", ["cpu_layer", *arguments])
    cpu_layer.main()
    rows = list(csv.DictReader((tmp_path / "rows").open()))
    kinds = ["", " int8", " int8 a8", " fp8", " int4", " int4 a8"]
    kinds = [kind for kind in kinds if build.has_vnni() or "a8" not in kind]
    dense, pruned = (
        [f"heapr {name}{kind}" for kind in kinds] if extension.load() else [] for name in ("unpruned", "50% pruned")
    )
    arms = ["vllm", *dense, "vllm zeroed 50%", *pruned, "50% pruned in 1 buckets", "50% pruned in 4 buckets"]
    assert [(row["tokens"], row["arm"]) for row in rows] == [(tokens, arm) for tokens in "15" for arm in arms]
    for row in rows:
        assert float(row["microseconds"]) > 0 and row["threads"] == "1" and row["command"] and row["versions"]
        assert row["arm"] != "vllm" or float(row["vs_vllm"]) == float(row["kept"]) == 1
        if row["arm"].startswith("heapr 50% pruned"):
            padded = row["arm"].endswith("a8")  # to widths of 64 and more
            assert float(row["kept"]) == (0.708 if padded else 0.5) and float(row["kept_routed"]) < 1
        assert row["arm"] != "vllm zeroed 50%" or float(row["kept"]) == float(row["kept_routed"]) == 1
        assert row["arm"] != "heapr unpruned" or float(row["vs_unpruned"]) == 1
        assert 1 <= float(row["experts_hit"]) <= 4


def test_zeroed_weights_are_the_ragged_ones() -> None:
    """Neurons past an expert's width are zero in every copy; the kept ones are where they were."""
    narrow, wide = (RaggedLayout.build([32, 0, 96], stored) for stored in ([32, 0, 96], [96] * 3))
    rows = ExpertRows(torch.randn(2 * 128, 8), torch.randn(128, 8), torch.empty(0), 96)
    widened = cpu_layer._widened(rows, narrow, wide, torch.empty(0))
    w13, w2 = widened.w13, widened.w2
    for stored, count in ((w13.view(3, 2, 96, 8), [64, 0, 192]), (w2.view(3, 96, 8), [32, 0, 96])):
        assert (stored != 0).any(-1).flatten(1).sum(1).tolist() == count
    torch.testing.assert_close(w2.view(3, 96, 8)[0, :32], rows.w2[slice(*_rows(narrow, 0))])
    torch.testing.assert_close(w13.view(3, 2, 96, 8)[0, 1, :32], rows.w13[2 * narrow.place(0)[0] + 32 :][:32])


def _rows(layout: RaggedLayout, expert: int) -> tuple[int, int]:
    row, width = layout.place(expert)
    return row, row + width
