# SPDX-License-Identifier: Apache-2.0
"""What every Triton of the supported window makes of the kernels, for Hopper and Ampere. Needs no GPU."""

import pytest

from tools import compile_table, ptx, triton_window

EXAMPLE = """
    @%p1 ld.global.b16 { %rs1 }, [ %rd1 + 0 ];
    ld.global.L1::evict_last.v4.b32 { %r1, %r2, %r3, %r4 }, [ %rd2 + 0 ];
    ld.global.nc.b64 { %rd3 }, [ %rd2 + 8 ];
    ld.shared.b16 %rs2, [%r5];
    @%p2 st.global.v2.b16 [ %rd1 + 0 ], { %rs1, %rs2 };
    st.global.b8 [ %rd1 + 0 ], { %r1 };
    cp.async.cg.shared.global [ %r1 + 0 ], [ %rd1 + 0 ], 0x10, %r2;
    cp.async.ca.shared.global.L2::128B [ %r1 + 0 ], [ %rd1 + 0 ], 4;
    cp.async.commit_group;
    cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%r1], [%rd1, {%r2, %r3}], [%r4];
    wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {%r1}, %rd1, %rd2, %p1, 1, 1, 0, 1;
    wgmma.wait_group.sync.aligned 0;
"""
GEMMS = ("ragged_up_kernel", "ragged_down_kernel")
A8_GEMMS = ("a8_up_kernel", "a8_down_kernel")
KERNELS = (*GEMMS, *A8_GEMMS, "round_rows_kernel", "combine_kernel")


@pytest.fixture(scope="module")
def rows() -> list[dict[str, str]]:
    return compile_table.committed()


@pytest.mark.slow
def test_the_table_is_what_is_compiled_here(rows: list[dict[str, str]]) -> None:
    fresh = compile_table.compiled()
    differing = [row for row in fresh if row not in rows] + [row for row in rows if row not in fresh]
    assert not differing, f"run `make compile-table` and look at the diff; first: {differing[0]}"


@pytest.mark.long
def test_the_table_covers_the_window(rows: list[dict[str, str]]) -> None:
    assert {row["triton"] for row in rows} == set(triton_window.versions())
    assert len({row["triton"] for row in rows}) >= 4
    kernels = {(row["triton"], row["arch"], row["kernel"]) for row in rows}
    assert len(kernels) == len(KERNELS) * len(compile_table.ARCHES) * len(triton_window.versions())
    for switch in ("TMA", "CHAINED", "PREFETCH"):
        assert any(row[switch] not in ("", "0", "False") for row in rows), switch
    assert {row["FUSED"] for row in rows} == {"", "True", "False"}


def test_nothing_spills(rows: list[dict[str, str]]) -> None:
    assert not [row for row in rows if int(row["spill_bytes"]) or int(row["registers"]) > 255]


def test_no_access_is_narrow(rows: list[dict[str, str]]) -> None:
    """Of 2 bytes or less: single numbers instead of vectors. But the bf16 scales of a slab are as few as threads."""
    assert not [row for row in rows if int(row["narrow_loads"]) > 4 or int(row["narrow_stores"])]
    narrow = [row for row in rows if int(row["narrow_loads"])]
    assert {(row["kernel"], row["BY_CHANNEL"]) for row in narrow} <= {("a8_down_kernel", "False")}


def test_weights_come_by_wide_asynchronous_copies(rows: list[dict[str, str]]) -> None:
    """16 bytes each, and exactly the tiles of both operands in every stage; or whole tiles by TMA."""
    for row in (row for row in rows if row["kernel"] in GEMMS and not scales_its_weights(row)):
        assert row["async_other"] == "0", row
        if row["TMA"] == "True":
            assert int(row["tma"]) > 0, row
            continue
        assert copied_bytes(row) == tile_bytes(row), row


def test_products_of_8_by_8_bits_are_read_and_multiplied_as_such(rows: list[dict[str, str]]) -> None:
    """By copies of 16 bytes, or 8 where a thread has no more; E4M3 in wgmma at every height, int8 from 64 rows on."""
    for row in (row for row in rows if row["kernel"] in A8_GEMMS):
        is_low = row["kernel"] == "a8_down_kernel" and row["BLOCK_M"] == "16"
        assert (row["async_other"] != "0") == is_low, row
        others = int(row["async_other"]) * 8 * 32 * int(row["num_warps"])
        assert copied_bytes(row) + others == tile_bytes(row), row
        uses_wgmma = row["arch"] == "sm_90a" and (row["weights"] == "fp8e4nv" or int(row["BLOCK_M"]) >= 64)
        assert (int(row["wgmma"]) > 0) == uses_wgmma, row
    found = {(row["arch"], row["weights"]) for row in rows if row["kernel"] in A8_GEMMS}
    assert found == {("sm_80", "i8"), ("sm_90a", "i8"), ("sm_90a", "fp8e4nv")}, "sm_80 does not multiply E4M3"


def test_scales_of_weights_come_with_them(rows: list[dict[str, str]]) -> None:
    """Asynchronously: four bytes per thread and stage; Triton 3.6 copies the same ones for every row of threads."""
    for row in (row for row in rows if scales_its_weights(row) and row["weights"] != "u16"):
        stages = int(row["num_stages"])
        if row["triton"].startswith("3.6."):
            assert tile_bytes(row) < copied_bytes(row) <= 2 * tile_bytes(row) and row["async_other"] == "16", row
        else:
            assert tile_bytes(row) == copied_bytes(row) and int(row["async_other"]) == stages, row


def test_words_and_scales_of_4_bits_come_together(rows: list[dict[str, str]]) -> None:
    """Words by 16 bytes, scales of every plane by four, and inputs by eight where two warps copy 16 rows of a plane."""
    scaled = [row for row in rows if scales_its_weights(row) and row["weights"] == "u16"]
    assert {row["kernel"] for row in scaled} == set(GEMMS)
    for row in scaled:
        stages, block_m, block_k = (int(row[name]) for name in ("num_stages", "BLOCK_M", "BLOCK_K"))
        by_eight = block_m * 2 * 16 < 16 * 32 * int(row["num_warps"]) and row["kernel"] == "ragged_down_kernel"
        by_sixteen = tile_bytes(row) - (stages * block_k * 2 * block_m if by_eight else 0)
        if row["triton"].startswith("3.6."):
            assert copied_bytes(row) >= by_sixteen, row
        else:
            assert copied_bytes(row) == by_sixteen, row
            assert int(row["async_other"]) == 4 * stages * (2 if by_eight else 1), row


def test_every_kind_of_codes_is_compiled(rows: list[dict[str, str]]) -> None:
    """8 bits in groups of 128 and by channel, which is a group of all 2048 inputs; casts of E4M3 need sm_89."""
    kinds = {
        (row["arch"], row["weights"], row["GROUP"]) for row in rows if row["kernel"] in GEMMS and row["GROUP"] != "0"
    }
    expected = {("sm_80", "i8"), ("sm_80", "u8"), ("sm_90a", "i8"), ("sm_90a", "u8"), ("sm_90a", "fp8e4nv")}
    in_4_bits = {(arch, "u16", "64") for arch in compile_table.ARCHES}
    assert kinds == {(*kind, group) for kind in expected for group in ("128", "2048")} | in_4_bits


def scales_its_weights(row: dict[str, str]) -> bool:
    """Whether it is a down GEMM of neurons with scales per group of outputs, or a tall up GEMM in 4 bits."""
    is_tall = row["weights"] == "u16" and int(row["BLOCK_M"] or 0) >= 64
    return row["GROUP"] not in ("", "0") and (is_tall or row["BY_CHANNEL"] == "False")


def copied_bytes(row: dict[str, str]) -> int:
    """By asynchronous copies of 16 bytes, in all stages."""
    return int(row["async_16"]) * 16 * 32 * int(row["num_warps"])


def tile_bytes(row: dict[str, str]) -> int:
    """Of both operands, in all stages."""
    block_m, block_n, block_k, stages = (int(row[name]) for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K", "num_stages"))
    weight_rows = 2 * block_n if row["kernel"] in ("ragged_up_kernel", "a8_up_kernel") else block_n
    bytes_of_weights = {"bf16": 2, "u16": 0.5}.get(row["weights"], 1)
    bytes_of_activations = 1 if row["kernel"] in A8_GEMMS else 2
    return int(stages * block_k * (bytes_of_activations * block_m + bytes_of_weights * weight_rows))


def test_instructions_are_counted() -> None:
    assert ptx.loads(EXAMPLE) == {2: 1, 16: 1, 8: 1} and ptx.stores(EXAMPLE) == {4: 1, 1: 1}
    assert ptx.narrow(ptx.loads(EXAMPLE)) == ptx.narrow(ptx.stores(EXAMPLE)) == 1
    assert ptx.async_copies(EXAMPLE) == {16: 1, 4: 1}
    assert ptx.tma_copies(EXAMPLE) == ptx.wgmmas(EXAMPLE) == 1
    assert ptx.describe(ptx.loads(EXAMPLE)) == "1 x 2 B, 1 x 8 B, 1 x 16 B"


def test_large_tiles_use_wgmma_on_hopper(rows: list[dict[str, str]]) -> None:
    large = [row for row in rows if row["kernel"] in GEMMS and row["arch"] == "sm_90a" and int(row["BLOCK_M"]) >= 64]
    assert large and all(int(row["wgmma"]) for row in large)


def test_tiles_fit_shared_memory(rows: list[dict[str, str]]) -> None:
    limits = {"sm_90a": 227 * 1024, "sm_80": 163 * 1024}
    assert all(int(row["shared_bytes"]) <= limits[row["arch"]] for row in rows)
