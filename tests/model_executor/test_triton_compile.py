# SPDX-License-Identifier: Apache-2.0
"""What every Triton of the supported window makes of the kernels, for Hopper and Ampere. Needs no GPU."""

import pytest

from tests import triton_window
from tests.model_executor import compile_table

GEMMS = ("ragged_up_kernel", "ragged_down_kernel")


@pytest.fixture(scope="module")
def rows() -> list[dict[str, str]]:
    return compile_table.committed()


def test_the_table_is_what_is_compiled_here(rows: list[dict[str, str]]) -> None:
    fresh = compile_table.compiled()
    differing = [row for row in fresh if row not in rows] + [row for row in rows if row not in fresh]
    assert not differing, f"run `make compile-table` and look at the diff; first: {differing[0]}"


def test_the_table_covers_the_window(rows: list[dict[str, str]]) -> None:
    assert {row["triton"] for row in rows} == set(triton_window.versions())
    assert len({row["triton"] for row in rows}) >= 4
    kernels = {(row["triton"], row["arch"], row["kernel"]) for row in rows}
    assert len(kernels) == 3 * len(compile_table.ARCHES) * len(triton_window.versions())
    for switch in ("TMA", "CHAINED", "PREFETCH"):
        assert any(row[switch] not in ("", "0", "False") for row in rows), switch
    assert {row["FUSED"] for row in rows} == {"", "True", "False"}


def test_nothing_spills(rows: list[dict[str, str]]) -> None:
    assert not [row for row in rows if int(row["spill_bytes"]) or int(row["registers"]) > 255]


def test_no_access_is_narrow(rows: list[dict[str, str]]) -> None:
    """Of 2 bytes or less: single numbers instead of vectors."""
    assert not [row for row in rows if int(row["narrow_loads"]) or int(row["narrow_stores"])]


def test_weights_come_by_wide_asynchronous_copies(rows: list[dict[str, str]]) -> None:
    """16 bytes each, or whole tiles by TMA; through registers comes nothing but indices."""
    for row in rows:
        if row["kernel"] in GEMMS:
            assert int(row["async_16"]) + int(row["tma"]) > 0 and not int(row["async_other"]), row
            assert "16 B" not in row["loads"], row
        if row["TMA"] == "True":
            assert int(row["tma"]) > 0, row


def test_large_tiles_use_wgmma_on_hopper(rows: list[dict[str, str]]) -> None:
    large = [row for row in rows if row["kernel"] in GEMMS and row["arch"] == "sm_90a" and int(row["BLOCK_M"]) >= 64]
    assert large and all(int(row["wgmma"]) for row in large)


def test_tiles_fit_shared_memory(rows: list[dict[str, str]]) -> None:
    limits = {"sm_90a": 227 * 1024, "sm_80": 163 * 1024}
    assert all(int(row["shared_bytes"]) <= limits[row["arch"]] for row in rows)
