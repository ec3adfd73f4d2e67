# SPDX-License-Identifier: Apache-2.0
"""The torch reference and the CPU kernels against a dense fp64 loop, over a table of edge cases.

For other instruction sets than this CPU's best set ATEN_CPU_CAPABILITY to avx2 or default. With AddressSanitizer:

    LD_PRELOAD="$(c++ -print-file-name=libasan.so) $(c++ -print-file-name=libstdc++.so)" PYTHONMALLOC=malloc \\
        ASAN_OPTIONS=detect_leaks=0 HEAPR_CPU_CFLAGS="-fsanitize=address -g" \\
        python -m pytest -s tests/model_executor/kernels/test_op.py -k "fp64 or Compiled"
"""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("vllm")
from vllm.platforms import current_platform

from heapr_vllm.model_executor.experts import HeaprExperts
from heapr_vllm.model_executor.kernels import cpu_native
from heapr_vllm.model_executor.kernels.cpu_compiled import extension
from heapr_vllm.model_executor.kernels.cpu_native import WIDTH_UNIT, bucketed, native_isa
from heapr_vllm.model_executor.kernels.op import (
    RAGGED,
    REFERENCE,
    TRITON,
    index_tables,
    kernel_choice,
    pack,
    register_op,
    select_kernel,
    stored_widths,
)
from heapr_vllm.model_executor.storage.layout import RaggedLayout

current_platform.import_kernels()
register_op()

# tokens, widths of the experts, top_k, hidden, buckets, experts on another rank
CASES = [
    (1, [64, 32, 96], 2, 64, 3, ()),  # decode: one token
    (7, [0, 1, 13, 48], 2, 32, 4, ()),  # widths 0, 1, odd and full
    (64, [33, 31, 32, 160], 3, 64, 2, ()),  # around the width unit, coarse buckets
    (5, [48, 48, 48, 48], 1, 96, 1, ()),  # uniform, one call
    (9, [0, 16, 80, 16], 2, 64, 1, ()),  # one call with a zero-width expert inside
    (300, [96, 16, 64, 0, 32, 8], 6, 128, 6, ()),  # every token to every expert
    (33, [40, 24, 72, 56], 2, 64, 4, (1, 2)),  # expert parallel: half of the experts elsewhere
    (4, [64, 64], 1, 32, 2, (0,)),  # some tokens have no local expert
    (17, [0, 0, 0, 40], 2, 64, 3, ()),  # nearly dead layer
    (3, [0, 0], 1, 32, 2, ()),  # dead layer
    (40, [0, 0, 17], 3, 32, 2, (2,)),  # nothing is stored here
    (1100, [24, 8], 2, 32, 2, ()),  # more tokens than the compiled op takes at once, and no divisor of its tiles
]
TOLERANCES = {torch.float32: (1e-5, 1e-5), torch.bfloat16: (3e-2, 3e-2), torch.float16: (3e-3, 3e-3)}


def layer(case: tuple, dtype: torch.dtype, kernel: str) -> tuple:
    """Random inputs of a case, the op's arguments, and the expected output in fp64. Padding starts as NaN."""
    tokens, widths, top_k, hidden, max_buckets, remote = case
    generator = torch.Generator().manual_seed(len(widths) * tokens)
    local = [e for e in range(len(widths)) if e not in remote]
    local_widths = [widths[e] for e in local]
    stored = (
        bucketed(local_widths, WIDTH_UNIT, max_buckets)
        if kernel not in (REFERENCE, TRITON, RAGGED)
        else stored_widths(kernel, local_widths, top_k, hidden, dtype.itemsize)
    )
    layout = RaggedLayout.build(local_widths, stored)
    w13 = torch.full((2 * layout.num_rows, hidden), torch.nan, dtype=dtype)
    w2 = torch.full((layout.num_rows, hidden), torch.nan, dtype=dtype)
    slots = [layout.num_slots] * len(widths)
    x = torch.randn(tokens, hidden, generator=generator).to(dtype)
    scores = torch.rand(tokens, len(widths), generator=generator)
    weights, ids = scores.softmax(-1).topk(top_k)
    expected = torch.zeros(tokens, hidden, dtype=torch.float64)
    for i, expert in enumerate(local):
        slots[expert] = layout.slots[i]
        gate, up, down = (torch.randn(widths[expert], hidden, generator=generator).mul(0.2).to(dtype) for _ in range(3))
        if layout.slots[i] < layout.num_slots:
            row, stored = layout.place(i)
            for flat, first, rows in ((w13, 2 * row, gate), (w13, 2 * row + stored, up), (w2, row, down)):
                flat[first : first + stored] = 0
                flat[first : first + len(rows)] = rows
        h = F.silu(x.double() @ gate.double().T) * (x.double() @ up.double().T)
        route = (weights * (ids == expert)).sum(-1).double()
        expected += route[:, None] * (h @ down.double())
    pack(kernel, w13, w2, layout)
    tables = index_tables(kernel, slots, layout)
    return (x, w13, w2, weights, ids.int(), *tables, layout.max_width, kernel), expected


def kernels(dtype: torch.dtype) -> list[str]:
    native = native_isa(dtype, 32)
    return [REFERENCE, *[native] * (native is not None), *[RAGGED] * extension.load()]


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"T{case[0]}-{'_'.join(map(str, case[1]))}-k{case[2]}")
def test_against_dense_fp64(case: tuple, dtype: torch.dtype) -> None:
    rtol, atol = TOLERANCES[dtype]
    for kernel in kernels(dtype):
        arguments, expected = layer(case, dtype, kernel)
        output = torch.full_like(arguments[0], torch.nan)
        torch.ops.heapr.ragged_moe(output, *arguments)
        torch.testing.assert_close(output.double(), expected, rtol=rtol, atol=atol * expected.abs().max().item())
        assert (output - expected).norm() <= min(rtol, 1e-2) * expected.norm()
        again = torch.full_like(output, torch.nan)
        torch.ops.heapr.ragged_moe(again, *arguments)
        assert torch.equal(output, again), "not repeatable"


@pytest.mark.parametrize("kernel", kernels(torch.float32))
def test_ids_of_nobody_add_nothing(kernel: str) -> None:
    """Some all-to-all backends mark routes of other ranks with -1."""
    arguments, _ = layer((9, [64, 32, 96], 2, 64, 3, ()), torch.float32, kernel)
    outputs = []
    for ids, weights in (
        (arguments[4], arguments[3] * (arguments[4] != 1)),
        (arguments[4].where(arguments[4] != 1, -1), arguments[3]),
    ):
        output = torch.full_like(arguments[0], torch.nan)
        torch.ops.heapr.ragged_moe(output, *arguments[:3], weights, ids, *arguments[5:])
        outputs.append(output)
    torch.testing.assert_close(*outputs)


@pytest.mark.skipif(not extension.load(), reason="no C++ compiler")
class TestCompiledOp:
    def test_does_not_depend_on_the_number_of_threads(self) -> None:
        arguments, _ = layer((50, [64, 48, 96], 2, 64, 3, ()), torch.bfloat16, RAGGED)
        outputs, threads = [], torch.get_num_threads()
        try:
            for count in (1, 2, 3):
                torch.set_num_threads(count)
                output = torch.empty_like(arguments[0])
                torch.ops.heapr.cpu_ragged_moe(output, *arguments[:7])
                outputs.append(output)
        finally:
            torch.set_num_threads(threads)
        assert torch.equal(outputs[0], outputs[1]) and torch.equal(outputs[0], outputs[2])

    def test_ids_beyond_all_experts_add_nothing(self) -> None:
        arguments, _ = layer((9, [64, 32, 96], 2, 64, 3, ()), torch.float32, RAGGED)
        x, w13, w2, weights, _, slots, tables, *_ = arguments
        output = torch.full_like(x, torch.nan)
        ids = torch.tensor([3, 2**31 - 1, -(2**31)] * 6, dtype=torch.int32).view(9, 2)
        torch.ops.heapr.cpu_ragged_moe(output, x, w13, w2, weights, ids, slots, tables)
        assert torch.equal(output, torch.zeros_like(output))

    def test_shapes_that_do_not_fit_are_refused(self) -> None:
        arguments, _ = layer((9, [64, 32, 96], 2, 64, 3, ()), torch.float32, RAGGED)
        x, w13, w2, *others = arguments[:7]
        for wrong in ((x.half(), w13, w2), (x, w13[1:], w2), (x[:, :48], w13, w2), (x[1:], w13, w2)):
            with pytest.raises(RuntimeError, match="cpu_ragged_moe"):
                torch.ops.heapr.cpu_ragged_moe(torch.empty_like(x), *wrong, *others)

    def test_no_tokens(self) -> None:
        arguments, _ = layer((0, [64, 32], 2, 64, 3, ()), torch.bfloat16, RAGGED)
        torch.ops.heapr.cpu_ragged_moe(torch.empty_like(arguments[0]), *arguments[:7])

    def test_choice_can_be_overridden(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("HEAPR_CPU_KERNEL", "ragged")
        assert select_kernel(torch.bfloat16, 64) == RAGGED
        assert select_kernel(torch.bfloat16, 48) == REFERENCE, "panels are 32 columns wide"
        monkeypatch.setenv("HEAPR_CPU_KERNEL", "native")
        assert select_kernel(torch.bfloat16, 64) == native_isa(torch.bfloat16, 64)

    def test_compiled_graphs_are_not_shared_between_kernels(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """`kernel_choice` is a part of the key of vLLM's cache."""
        choices = set()
        for kernel, buckets in (("ragged", ""), ("native", ""), ("native", "always"), ("native", "never")):
            monkeypatch.setenv("HEAPR_CPU_KERNEL", kernel)
            monkeypatch.setenv("HEAPR_CPU_BUCKETS", buckets)
            choices.add(kernel_choice())
        assert len(choices) == 4


@pytest.mark.parametrize("obstacle", ["compiler", "folder"])
def test_without_a_compiler_the_native_op_is_used(obstacle: str, tmp_path: Path) -> None:
    """One line says so; nothing fails."""
    if obstacle == "folder":
        (tmp_path / "heapr").write_text("in the way")
    code = """if True:
        import logging
        import torch
        from vllm.platforms import current_platform
        from heapr_vllm.model_executor.ragged_moe import select_kernel
        logging.basicConfig(level=logging.INFO)
        current_platform.import_kernels()
        print("kernel", select_kernel(torch.float32, 64), select_kernel(torch.float32, 64))
    """
    environment = {
        **os.environ,
        "CXX": "no-such-compiler",
        "VLLM_CACHE_ROOT": str(tmp_path),
        "HEAPR_CPU_KERNEL": "ragged",
    }
    process = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    printed = process.stdout + process.stderr
    assert "kernel vec vec" in printed and printed.count("kernel cannot be compiled") == 1, printed
    assert "Traceback" not in printed


def test_native_kernel_is_used_where_it_fits() -> None:
    assert native_isa(torch.float32, 64) == "vec" and native_isa(torch.bfloat16, 64) in ("vec", "amx")
    assert native_isa(torch.float32, 48) is None, "the op needs hidden sizes that are multiples of 32"


def test_native_op_never_sees_ids_out_of_range(monkeypatch: pytest.MonkeyPatch) -> None:
    """The op does not check ids: -1 or a global id of another rank would corrupt memory."""
    calls = []

    def spy(output, hidden_states, w13, w2, topk_weights, topk_ids, num_experts, isa) -> None:
        calls.append((int(topk_ids.min()), int(topk_ids.max()), num_experts))
        output.zero_()

    monkeypatch.setattr(cpu_native, "cpu_uniform_moe", spy)
    for case in CASES:
        arguments, _ = layer(case, torch.float32, native_isa(torch.float32, case[3]))
        cpu_native.cpu_ragged_moe(torch.empty_like(arguments[0]), *arguments[:7], arguments[8])
    assert len(calls) > len(CASES) - 3
    assert all(lowest >= 0 and highest < count for lowest, highest, count in calls)


@pytest.mark.parametrize("kernel", kernels(torch.float32))
def test_ops_are_registered_once_and_opaque(kernel: str) -> None:
    register_op()
    arguments, expected = layer(CASES[2], torch.float32, kernel)
    op, arguments = (
        (torch.ops.heapr.cpu_ragged_moe, arguments[:7]) if kernel == RAGGED else (torch.ops.heapr.ragged_moe, arguments)
    )
    assert op.default._schema.arguments[0].alias_info.is_write

    @torch.compile(fullgraph=True, backend="aot_eager")
    def compiled(output: torch.Tensor) -> torch.Tensor:
        op(output, *arguments)
        return output * 2

    torch.testing.assert_close(compiled(torch.empty_like(arguments[0])).double(), 2 * expected, rtol=1e-4, atol=1e-4)


def test_small_layers_get_one_bucket_and_large_ones_several() -> None:
    assert len(set(cpu_native.stored_widths([16, 48, 96, 96], 2, 256, 2))) == 1
    large = cpu_native.stored_widths([64 * (e % 12) for e in range(128)], 8, 2048, 2)
    assert len(set(large) - {0}) > 2 and sum(large) < 128 * 704


@pytest.mark.parametrize("kernel", kernels(torch.float32))
def test_router_weight_on_input_is_not_applied_twice(kernel: str) -> None:
    """With it (top-k 1) vLLM has multiplied the hidden states already."""
    arguments, _ = layer((6, [32, 64], 1, 64, 2, ()), torch.float32, kernel)
    x, w13, w2, weights, ids, slots, tables, _, kernel = arguments
    experts = HeaprExperts.__new__(HeaprExperts)
    experts.layer = SimpleNamespace(heapr_slots=slots, heapr_table=tables)
    experts.max_width, experts.kernel, experts.is_uniform = 64, kernel, False
    outputs = []
    for on_input in (False, True):
        output = torch.empty_like(x)
        experts.apply(output, x, w13, w2, weights, ids, None, 2, None, None, None, None, None, None, on_input)
        outputs.append(output)
    torch.testing.assert_close(outputs[0], outputs[1] * weights)
