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
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("vllm")
from vllm.platforms import current_platform

from heapr_vllm.model_executor.experts import HeaprExperts
from heapr_vllm.model_executor.kernels import cpu_native
from heapr_vllm.model_executor.kernels.base import ExpertRows, RaggedKernel, Routes
from heapr_vllm.model_executor.kernels.cpu_compiled import extension
from heapr_vllm.model_executor.kernels.cpu_compiled.kernel import CompiledKernel
from heapr_vllm.model_executor.kernels.cpu_native import WIDTH_UNIT, BucketsKernel, NativeKernel, bucketed, native_isa
from heapr_vllm.model_executor.kernels.op import register_op
from heapr_vllm.model_executor.kernels.reference import ReferenceKernel
from heapr_vllm.model_executor.storage.layout import RaggedLayout
from heapr_vllm.model_executor.storage.traffic_sums import TrafficSums
from tests.model_executor.kernels.thread_counts import outputs_by_threads

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
    (40, [528, 300], 2, 544, 2, ()),  # deeper than what several runs of the compiled op's rows take at a time
]
TOLERANCES = {torch.float32: (1e-5, 1e-5), torch.bfloat16: (3e-2, 3e-2), torch.float16: (3e-3, 3e-3)}


class Layer(NamedTuple):
    """Random inputs of a case, packed for `kernel`, and the expected output in fp64."""

    kernel: RaggedKernel
    x: torch.Tensor
    routes: Routes
    experts: ExpertRows
    expected: torch.Tensor

    def run(self, x: torch.Tensor | None = None, **routes: torch.Tensor) -> torch.Tensor:
        """The output through the custom op, or the kernel's own; `routes` replace those of the case."""
        x = self.x if x is None else x
        output = torch.full_like(self.x, torch.nan)
        self.kernel.run_in_graph(output, x, replace(self.routes, **routes), self.experts)
        return output


def layer(case: tuple, dtype: torch.dtype, kernel: RaggedKernel) -> Layer:
    """Padding starts as NaN where nothing overwrites it."""
    tokens, widths, top_k, hidden, max_buckets, remote = case
    generator = torch.Generator().manual_seed(len(widths) * tokens)
    local = [e for e in range(len(widths)) if e not in remote]
    local_widths = [widths[e] for e in local]
    stored = kernel.stored_widths(local_widths)
    if isinstance(kernel, NativeKernel):
        stored = bucketed(local_widths, WIDTH_UNIT, max_buckets)
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
    kernel.pack(w13, w2, layout)
    slots, table = kernel.index_tables(slots, layout)
    return Layer(kernel, x, Routes(weights, ids.int(), slots), ExpertRows(w13, w2, table, layout.max_width), expected)


def kernels(dtype: torch.dtype) -> list[RaggedKernel]:
    """All that run here."""
    found = (ReferenceKernel(), NativeKernel(), CompiledKernel())
    return [k for k in found if k.machine_obstacle() is None and k.layer_obstacle(dtype, 32) is None]


by_name = pytest.mark.parametrize("kernel", kernels(torch.float32), ids=lambda kernel: kernel.name)


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"T{case[0]}-{'_'.join(map(str, case[1]))}-k{case[2]}")
def test_against_dense_fp64(case: tuple, dtype: torch.dtype) -> None:
    rtol, atol = TOLERANCES[dtype]
    for kernel in kernels(dtype):
        built = layer(case, dtype, kernel)
        output, expected = built.run(), built.expected
        torch.testing.assert_close(output.double(), expected, rtol=rtol, atol=atol * expected.abs().max().item())
        assert (output - expected).norm() <= min(rtol, 1e-2) * expected.norm()
        assert torch.equal(output, built.run()), "not repeatable"


@by_name
def test_absent_ids_add_nothing(kernel: RaggedKernel) -> None:
    """Some all-to-all backends mark routes of other ranks with -1."""
    built = layer((9, [64, 32, 96], 2, 64, 3, ()), torch.float32, kernel)
    is_here = built.routes.ids != 1
    without_weight = built.run(weights=built.routes.weights * is_here)
    torch.testing.assert_close(without_weight, built.run(ids=built.routes.ids.where(is_here, -1)))


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_traffic_against_the_reference(case: tuple, dtype: torch.dtype) -> None:
    """Two calls add up; the output is the same as without."""
    if not extension.load():
        pytest.skip("no C++ compiler")
    sums = []
    for kernel in (ReferenceKernel(), CompiledKernel()):
        built = layer(case, dtype, kernel)
        with_traffic = built._replace(experts=replace(built.experts, traffic=no_traffic(built.experts)))
        for _ in range(2):
            output = torch.full_like(built.x, torch.nan)
            kernel.run(output, built.x, built.routes, with_traffic.experts)
            assert torch.equal(output, built.run())
        sums.append(by_expert(with_traffic, max(case[1])))
    (expected, expected_tokens), (found, tokens) = sums
    rtol, atol = TOLERANCES[dtype]
    torch.testing.assert_close(found, expected, rtol=rtol, atol=atol)
    assert torch.equal(tokens, expected_tokens)


def by_expert(layer: Layer, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Sums of squares [experts, width] and tokens [experts] that a layer's runs left; none of experts without slot."""
    traffic, slots = layer.experts.traffic, layer.routes.slots[:-1]
    assert traffic is not None
    energy = F.pad(traffic.activation_sq, (0, max(0, width - layer.experts.max_width), 0, 1))
    return energy[slots.long(), :width], F.pad(traffic.tokens, (0, 1))[slots.long()]


def no_traffic(experts: ExpertRows) -> TrafficSums:
    slots = len(experts.table)
    energy = torch.zeros(slots, experts.max_width, dtype=torch.float64)
    return TrafficSums(energy, torch.zeros(slots, dtype=torch.int64))


@pytest.mark.skipif(not extension.load(), reason="no C++ compiler")
class TestCompiledOp:
    def test_does_not_depend_on_the_number_of_threads(self) -> None:
        built = layer((50, [64, 48, 96], 2, 64, 3, ()), torch.bfloat16, CompiledKernel())
        outputs = outputs_by_threads(built.run)
        assert torch.equal(outputs[0], outputs[1]) and torch.equal(outputs[0], outputs[2])

    def test_ids_beyond_all_experts_add_nothing(self) -> None:
        built = layer((9, [64, 32, 96], 2, 64, 3, ()), torch.float32, CompiledKernel())
        ids = torch.tensor([3, 2**31 - 1, -(2**31)] * 6, dtype=torch.int32).view(9, 2)
        assert torch.equal(built.run(ids=ids), torch.zeros_like(built.x))

    def test_shapes_that_do_not_fit_are_refused(self) -> None:
        built = layer((9, [64, 32, 96], 2, 64, 3, ()), torch.float32, CompiledKernel())
        x, w13 = built.x, built.experts.w13
        for wrong, rows in ((x.half(), w13), (x, w13[1:]), (x[:, :48], w13), (x[1:], w13)):
            with pytest.raises(RuntimeError, match="cpu_ragged_moe"):
                built._replace(experts=replace(built.experts, w13=rows)).run(wrong)
        traffic = no_traffic(built.experts)
        for sums in (
            replace(traffic, activation_sq=traffic.activation_sq.float()),
            replace(traffic, activation_sq=traffic.activation_sq[1:]),
            replace(traffic, tokens=traffic.tokens[1:]),
        ):
            with pytest.raises(RuntimeError, match="sums of traffic"):
                CompiledKernel().run(built.x, built.x, built.routes, replace(built.experts, traffic=sums))

    def test_no_tokens(self) -> None:
        assert layer((0, [64, 32], 2, 64, 3, ()), torch.bfloat16, CompiledKernel()).run().shape == (0, 64)


@pytest.mark.parametrize("obstacle", ["compiler", "folder"])
def test_without_a_compiler_the_native_op_is_used(obstacle: str, tmp_path: Path) -> None:
    """One line says so; nothing fails."""
    if obstacle == "folder":
        (tmp_path / "heapr").write_text("in the way")
    code = """if True:
        import logging
        import torch
        from vllm.platforms import current_platform
        from heapr_vllm.model_executor.kernels.choice import candidates
        logging.basicConfig(level=logging.INFO)
        current_platform.import_kernels()
        print("kernels", *(kernel.name for _ in range(2) for kernel in candidates(torch.float32, 64)))
    """
    environment = {
        **os.environ,
        "CXX": "no-such-compiler",
        "VLLM_CACHE_ROOT": str(tmp_path),
        "HEAPR_CPU_KERNEL": "ragged",
    }
    process = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    printed = process.stdout + process.stderr
    assert "kernels native buckets native buckets" in printed and printed.count("kernel cannot be compiled") == 1, (
        printed
    )
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
        layer(case, torch.float32, NativeKernel()).run()
    assert len(calls) > len(CASES) - 3
    assert all(lowest >= 0 and highest < count for lowest, highest, count in calls)


@by_name
def test_ops_are_registered_once_and_opaque(kernel: RaggedKernel) -> None:
    register_op()
    built = layer(CASES[2], torch.float32, kernel)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def compiled(output: torch.Tensor) -> torch.Tensor:
        kernel.run_in_graph(output, built.x, built.routes, built.experts)
        return output * 2

    output = compiled(torch.empty_like(built.x))
    torch.testing.assert_close(output.double(), 2 * built.expected, rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(native_isa(torch.float32, 96) is None, reason="vLLM's op is not for this CPU")
def test_uniform_experts_are_traced_as_a_dense_layer() -> None:
    built = layer((5, [96] * 4, 2, 96, 1, ()), torch.float32, NativeKernel())
    uniform = replace(built.experts, uniform_experts=4)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def compiled(output: torch.Tensor) -> torch.Tensor:
        built.kernel.run_in_graph(output, built.x, built.routes, uniform)
        return output * 2

    output = compiled(torch.empty_like(built.x))
    torch.testing.assert_close(output.double(), 2 * built.expected, rtol=1e-4, atol=1e-4)


def test_one_bucket_or_several() -> None:
    widths = [64 * (e % 12) for e in range(128)]
    assert set(NativeKernel().stored_widths(widths)) == {704}
    stored = BucketsKernel().stored_widths(widths)
    assert 2 < len(set(stored) - {0}) <= 6 and all(map(int.__le__, widths, stored))


@by_name
def test_router_weight_on_input_is_not_applied_twice(kernel: RaggedKernel) -> None:
    """With it (top-k 1) vLLM has multiplied the hidden states already."""
    built = layer((6, [32, 64], 1, 64, 2, ()), torch.float32, kernel)
    rows, routes = built.experts, built.routes
    experts = HeaprExperts.__new__(HeaprExperts)
    experts.layer = SimpleNamespace(heapr_slots=routes.slots, heapr_table=rows.table)
    experts.kernel, experts.max_width, experts.uniform_experts = kernel, 64, 0
    experts.scales, experts.recorded = lambda layer: None, ""
    outputs = []
    for on_input in (False, True):
        output = torch.empty_like(built.x)
        experts.apply(output, built.x, rows.w13, rows.w2, routes.weights, routes.ids, *[None] * 8, on_input)
        outputs.append(output)
    torch.testing.assert_close(outputs[0], outputs[1] * routes.weights)
