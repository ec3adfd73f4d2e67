# SPDX-License-Identifier: Apache-2.0
"""A few seconds of the soak, so that the program stays in order; memory needs longer to become flat."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.soak import KINDS, memory_growth
from tests.conftest import BUNDLED, prune


@pytest.mark.slow
@pytest.mark.vllm
def test_mixed_requests_against_the_bundled_model(corpus: Path, tmp_path: Path) -> None:
    prune(BUNDLED, corpus, tmp_path, sparsity=0.3)
    process = subprocess.run(
        [
            sys.executable,
            "-m",
            "benchmarks.soak",
            "--model",
            str(tmp_path / "compact"),
            "--minutes",
            "0.15",
            "--prompts",
            "8",
            "--max-growth",
            "100",
            "--json",
            str(tmp_path / "soak.json"),
            "--log",
            str(tmp_path / "soak.log"),
            "--",
            "--enforce-eager",
        ],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stdout[-3000:] + process.stderr[-3000:]
    report = json.loads((tmp_path / "soak.json").read_text())
    assert {name.partition(", ")[2] for name in report["requests"]} == set(KINDS)
    assert (report["errors"], report["mismatches"]) == (0, 0) and report["tokens_per_second"] > 0


def test_growth_counts_from_the_end_of_the_warm_up() -> None:
    samples = [
        (0.0, {"a": 50.0, "b": 10.0}),
        (5.0, {"a": 90.0, "b": 10.0}),
        (9.0, {"a": 95.0, "b": 10.0}),
        (12.0, {"a": 92.0, "b": 10.0}),
    ]
    assert memory_growth(samples, 5) == {
        "start": 60.0,
        "warm": 100.0,
        "end": 102.0,
        "max": 105.0,
        "growth_percent": 5.0,
    }
