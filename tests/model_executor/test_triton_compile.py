# SPDX-License-Identifier: Apache-2.0
"""Default and shipped tiles of the paper's models compile for Hopper and Ampere without spills. Needs no GPU."""

import json
import os
import subprocess
import sys

import pytest

from tests.model_executor.compile_kernels import ARCHES, TOKENS
from tests.model_executor.engine import ROOT


@pytest.fixture(scope="module")
def rows() -> list[dict]:
    """In a process of its own: here the kernels are interpreted."""
    process = subprocess.run([sys.executable, "-m", "tests.model_executor.compile_kernels"], capture_output=True,
                             text=True, cwd=ROOT, env={**os.environ, "TRITON_INTERPRET": "0"})
    assert process.returncode == 0, process.stderr[-4000:]
    return [json.loads(line) for line in process.stdout.splitlines()]


def test_both_kernels_compile_for_every_architecture(rows: list[dict]) -> None:
    assert {(row["kernel"], row["arch"]) for row in rows} == {
        (kernel, arch) for kernel in ("ragged_up_kernel", "ragged_down_kernel") for arch in ARCHES}
    assert len(rows) > 2 * len(TOKENS)


def test_nothing_spills(rows: list[dict]) -> None:
    assert not [row for row in rows if row["spill_bytes"] or row["registers"] > 255]


def test_copies_are_asynchronous(rows: list[dict]) -> None:
    assert not [row for row in rows if not row["cp_async"]]


def test_large_tiles_use_wgmma_on_hopper(rows: list[dict]) -> None:
    large = [row for row in rows if row["arch"] == "sm_90a" and row["BLOCK_M"] >= 64]
    assert large and all(row["wgmma"] for row in large)
    limits = {"sm_90a": 227 * 1024, "sm_80": 163 * 1024}
    assert all(row["shared_bytes"] <= limits[row["arch"]] for row in rows)
