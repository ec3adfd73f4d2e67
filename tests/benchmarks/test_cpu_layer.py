# SPDX-License-Identifier: Apache-2.0
"""`benchmarks.cpu_layer` at a small size."""

import csv
from pathlib import Path

import pytest

pytest.importorskip("vllm")
from benchmarks import cpu_layer
from heapr_vllm.model_executor.kernels.cpu_compiled import extension


def test_rows(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(
        "sys.argv",
        [
            "cpu_layer",
            "--experts",
            "4",
            "--top-k",
            "2",
            "--hidden",
            "64",
            "--width",
            "96",
            "--tokens",
            "1",
            "5",
            "--threads",
            "1",
            "--rounds",
            "2",
            "--sparsity",
            "0.5",
            "--buckets",
            "1",
            "4",
            "--csv",
            str(tmp_path / "rows"),
        ],
    )
    cpu_layer.main()
    rows = list(csv.DictReader((tmp_path / "rows").open()))
    ours = ["heapr unpruned", "heapr 50% pruned"] if extension.load() else []
    arms = ["vllm", *ours, "50% pruned in 1 buckets", "50% pruned in 4 buckets"]
    assert [(row["tokens"], row["arm"]) for row in rows] == [(tokens, arm) for tokens in "15" for arm in arms]
    for row in rows:
        assert float(row["microseconds"]) > 0 and row["threads"] == "1" and row["command"] and row["versions"]
        assert row["arm"] != "vllm" or float(row["vs_vllm"]) == float(row["kept"]) == 1
        assert row["arm"] != "heapr 50% pruned" or float(row["kept"]) == 0.5
