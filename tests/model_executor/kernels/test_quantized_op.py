# SPDX-License-Identifier: Apache-2.0
"""Experts in 8 and 4 bits on the compiled op and the reference, against a dense fp64 loop over the dequantised weights.

`test_op.py` says how to run other instruction sets and AddressSanitizer; here it is `-k "fp64 or code or rows"`.
"""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("vllm")
from vllm.platforms import current_platform

from heapr_vllm.formats.quantized import BITWISE, CODE_DTYPES, NAN_CODE, ExpertScheme, pack_nibbles
from heapr_vllm.model_executor.kernels.base import ExpertRows, RaggedKernel, Routes, Scales
from heapr_vllm.model_executor.kernels.cpu_compiled import build, extension
from heapr_vllm.model_executor.kernels.cpu_compiled.kernel import CompiledKernel
from heapr_vllm.model_executor.kernels.op import register_op
from heapr_vllm.model_executor.kernels.reference import ReferenceKernel
from heapr_vllm.model_executor.storage.layout import RaggedLayout
from tests.model_executor.engine import ROOT
from tests.model_executor.kernels.thread_counts import outputs_by_threads

current_platform.import_kernels()
register_op()

needs_op = pytest.mark.skipif(not extension.load(), reason="no C++ compiler")

# tokens, widths of the experts, top_k, hidden, group size (None: by channel), experts on another rank
CASES = [
    (1, [64, 32, 96], 2, 64, 64, ()),  # decode: one token
    (7, [0, 1, 13, 48], 2, 32, 32, ()),  # widths 0, 1, odd and full
    (9, [48, 48], 2, 96, 32, ()),  # an odd number of groups
    (64, [33, 31, 32, 160], 3, 64, None, ()),  # around the width unit
    (5, [1040, 300], 1, 128, 64, ()),  # deeper than what is decoded at a time, few rows
    (40, [1040, 300], 2, 576, None, ()),  # the same both ways, and many rows
    (300, [96, 16, 64, 0, 32, 8], 6, 384, 128, ()),  # every token to every expert
    (33, [40, 24, 72, 56], 2, 192, 96, (1, 2)),  # expert parallel, groups of three panels
    (70, [40, 64], 1, 512, 512, ()),  # a group deeper than what is decoded at a time
    (17, [0, 0, 0, 40], 2, 64, None, ()),  # nearly dead layer
    (3, [0, 0], 1, 32, 32, ()),  # dead layer
    (1100, [24, 8], 2, 32, 32, ()),  # more tokens than the compiled op takes at once
]
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 3e-3}
KINDS = ("int8", "fp8", "int4", "int4-int8")


class Layer(NamedTuple):
    """Random inputs of a case, packed for `kernel`, and the expected output in fp64."""

    kernel: RaggedKernel
    x: torch.Tensor
    routes: Routes
    experts: ExpertRows
    expected: torch.Tensor

    def run(self, tokens: slice = slice(None)) -> torch.Tensor:
        """The output for some of the tokens, through the custom op or the kernel's own."""
        output = torch.full_like(self.x[tokens], torch.nan)
        routes = replace(self.routes, weights=self.routes.weights[tokens], ids=self.routes.ids[tokens])
        self.kernel.run_in_graph(output, self.x[tokens], routes, self.experts)
        return output


def scheme_of(kind: str, group_size: int | None = 128) -> ExpertScheme:
    """The scheme of a name, by channel without a group size."""
    kind, _, down = kind.partition("-")
    scheme = ExpertScheme.for_hidden_size(kind, 256)
    down_bits = 8 if down else None
    return replace(scheme, strategy="group" if group_size else "channel", group_size=group_size, down_bits=down_bits)


def zeros(scheme: ExpertScheme, rows: int, hidden: int) -> torch.Tensor:
    """Codes of a matrix."""
    codes = torch.full((rows, hidden // scheme.codes_per_byte), scheme.zero_byte, dtype=BITWISE)
    return codes.view(scheme.code_dtype)


def layer(case: tuple, dtype: torch.dtype, kind: str, kernel: RaggedKernel) -> Layer:
    """An expert's largest weights differ by neuron, so that a wrong scale shows. Padding has code 0 and scale 1."""
    tokens, widths, top_k, hidden, group_size, remote = case
    group_size = 64 if kind.startswith("int4") and group_size is None else group_size
    scheme = scheme_of(kind, group_size)
    generator = torch.Generator().manual_seed(len(widths) * tokens)
    local = [e for e in range(len(widths)) if e not in remote]
    local_widths = [widths[e] for e in local]
    layout = RaggedLayout.build(local_widths, kernel.stored_widths(local_widths))
    groups = hidden // group_size if group_size else 1
    w13, w2 = (zeros(scheme.of(matrix), n * layout.num_rows, hidden) for matrix, n in (("w13", 2), ("w2", 1)))
    w13_scale = torch.ones(2 * layout.num_rows, groups)
    w2_scale = torch.ones(layout.num_rows, groups) if group_size else torch.ones(layout.num_slots, hidden)
    slots = [layout.num_slots] * len(widths)
    x = torch.randn(tokens, hidden, generator=generator).to(dtype)
    scores = torch.rand(tokens, len(widths), generator=generator)
    weights, ids = scores.softmax(-1).topk(top_k)
    expected = torch.zeros(tokens, hidden, dtype=torch.float64)
    for i, expert in enumerate(local):
        slots[expert] = layout.slots[i]
        if not widths[expert]:
            continue
        row, stored = layout.place(i)
        exact = []
        for shard, first in (("w1", 2 * row), ("w3", 2 * row + stored), ("w2", row)):
            weight = torch.randn(widths[expert], hidden, generator=generator).mul(0.2)
            weight *= torch.rand(widths[expert], 1, generator=generator) + 0.1
            weight *= torch.rand(1, hidden, generator=generator) + 0.1
            weight = weight.T.contiguous() if shard == "w2" else weight
            codes, scale = scheme.quantize(weight, shard)
            exact.append(scheme.dequantize(codes, scale, shard).double())
            codes, scale = (codes.view(BITWISE).T, scale.T) if shard == "w2" else (codes.view(BITWISE), scale)
            rows = slice(first, first + widths[expert])
            (w2 if shard == "w2" else w13).view(BITWISE)[rows] = codes
            if shard == "w2" and not group_size:
                w2_scale[slots[expert]] = scale[0]
            else:
                (w2_scale if shard == "w2" else w13_scale)[rows] = scale
        gate, up, down = exact
        h = F.silu(x.double() @ gate.T) * (x.double() @ up.T)
        route = (weights * (ids == expert)).sum(-1).double()
        expected += route[:, None] * (h @ down.T)
    scales = Scales(w13_scale, w2_scale)
    kernel.pack(w13, w2, layout, scales)
    slots, table = kernel.index_tables(slots, layout)
    experts = ExpertRows(w13, w2, table, layout.max_width, scales=scales)
    return Layer(kernel, x, Routes(weights, ids.int(), slots), experts, expected)


@pytest.mark.parametrize("kernel", [ReferenceKernel(), pytest.param(CompiledKernel(), marks=needs_op)], ids=type)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"T{case[0]}-H{case[3]}-g{case[4]}")
def test_against_dense_fp64(case: tuple, dtype: torch.dtype, kind: str, kernel: RaggedKernel) -> None:
    built = layer(case, dtype, kind, kernel)
    output, expected, tolerance = built.run(), built.expected, TOLERANCES[dtype]
    torch.testing.assert_close(output.double(), expected, rtol=tolerance, atol=tolerance * expected.abs().max().item())
    assert (output - expected).norm() <= min(tolerance, 1e-2) * expected.norm()
    assert torch.equal(output, built.run()), "not repeatable"


@needs_op
@pytest.mark.parametrize("tokens", [1, 30])
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_every_code_is_exact(kind: str, dtype: torch.dtype, tokens: int) -> None:
    """The output is one neuron's codes of down: gate and up have a weight of 1 each, and silu(64) * (1 / 64) is 1.

    All 256 codes of int8, -128 too, of E4M3 but NaN, subnormals too, and all 16 of 4 bits pass through all columns of a
    panel.
    """
    hidden, width, scheme = 256, 16, scheme_of(kind)
    bits = torch.arange(256, dtype=torch.uint8)
    if kind == "fp8":
        bits[(bits & NAN_CODE) == NAN_CODE] = 0
    layout = RaggedLayout.build([width], [width])
    kernel = CompiledKernel()
    slots, table = kernel.index_tables([0], layout)
    x = torch.zeros(tokens, hidden, dtype=dtype)
    x[:, 0], x[:, 1] = 64, 1 / 64
    routes = Routes(torch.ones(tokens, 1), torch.zeros(tokens, 1, dtype=torch.int32), slots)
    for shift in range(32):
        values = bits.roll(shift).view(CODE_DTYPES[scheme.type])
        if kind.startswith("int4"):
            values = (values & 15) - 8
        w13, w2 = (torch.zeros(n * width, hidden, dtype=values.dtype) for n in (2, 1))
        neuron, one = shift % width, torch.ones(()).to(values.dtype)
        w13[neuron, 0] = w13[width + neuron, 1] = one
        w2[neuron] = values
        if kind.startswith("int4"):
            w13, w2 = pack_nibbles(w13), w2 if scheme.down_bits else pack_nibbles(w2)
        scales = Scales(torch.ones(2 * width, 2), torch.ones(width, 2))
        kernel.pack(w13, w2, layout, scales)
        output = torch.empty_like(x)
        kernel.run(output, x, routes, ExpertRows(w13, w2, table, width, scales=scales))
        assert torch.equal(output, values.to(dtype).expand(tokens, -1))


@needs_op
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", CASES[3:9], ids=lambda case: f"T{case[0]}-H{case[3]}-g{case[4]}")
def test_rows_and_threads_do_not_change_results(case: tuple, kind: str) -> None:
    """Few rows decode in registers, many through the cache; both sum over the same parts."""
    built = layer(case, torch.bfloat16, kind, CompiledKernel())
    if not build.isa().endswith("amx"):  # tiles sum in another order
        singly = [built.run(slice(token, token + 1)) for token in range(min(case[0], 9))]
        assert torch.equal(torch.cat(singly), built.run()[: len(singly)])
    outputs = outputs_by_threads(built.run)
    assert torch.equal(outputs[0], outputs[1]) and torch.equal(outputs[0], outputs[2])


@needs_op
def test_scales_that_do_not_fit_are_refused() -> None:
    built = layer(CASES[0], torch.float32, "int8", CompiledKernel())
    scales = built.experts.scales
    assert scales is not None
    for wrong in (
        None,
        Scales(scales.w13[1:], scales.w2),
        Scales(scales.w13, scales.w2[1:]),
        Scales(scales.w13.double(), scales.w2),
        Scales(scales.w13.repeat(1, 4), scales.w2.repeat(1, 4)),
        Scales(scales.w13, scales.w2.repeat(1, 2)),
    ):
        with pytest.raises(RuntimeError, match="cpu_ragged_moe"):
            built._replace(experts=replace(built.experts, scales=wrong)).run()


@needs_op
def test_all_kinds_of_layer_are_run() -> None:
    for kind in KINDS:
        assert CompiledKernel().layer_obstacle(torch.bfloat16, 256, scheme_of(kind)) is None


@needs_op
@pytest.mark.slow
@pytest.mark.parametrize(
    "capability, flags", [("avx512", "-mno-avx512vbmi"), ("avx512", "-DHEAPR_AMX"), ("avx2", ""), ("default", "")]
)
def test_other_instruction_sets(capability: str, flags: str) -> None:
    """This file and the one of unquantized experts again, compiled for less than this CPU has."""
    if capability == "avx512" and not build.isa().startswith("avx512"):
        pytest.skip("no AVX-512 here")
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": capability, "HEAPR_CPU_CFLAGS": flags}
    files = [__file__, str(Path(__file__).with_name("test_op.py"))]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files, "-k", "fp64 or code or rows"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
