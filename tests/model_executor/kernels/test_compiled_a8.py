# SPDX-License-Identifier: Apache-2.0
"""Activations in 8 bits on the compiled op: sums of integers are exact, the rest is what its arithmetic says."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("vllm")

from heapr_vllm.formats.quantized import ExpertScheme, unpack_nibbles
from heapr_vllm.model_executor.kernels.base import ExpertRows, Routes, Scales
from heapr_vllm.model_executor.kernels.cpu_compiled import build
from heapr_vllm.model_executor.kernels.cpu_compiled.a8_kernel import CompiledA8Kernel
from heapr_vllm.model_executor.kernels.reference import ReferenceKernel, expert_weights
from heapr_vllm.model_executor.storage.layout import RaggedLayout
from tests.model_executor.kernels.largest_sums import check_largest_sums
from tests.model_executor.kernels.slabs import rounded_slabs
from tests.model_executor.kernels.test_op import by_expert, no_traffic
from tests.model_executor.kernels.test_quantized_op import CASES, layer, scheme_of
from tests.model_executor.kernels.thread_counts import outputs_by_threads

KERNEL = CompiledA8Kernel()
GROUP = 128  # activations, at most, that share a scale
SLABS = (20, [144, 272, 16], 2, 256, 128, ())  # more slabs than one, the last ones cut short
A8_CASES = [*(case for case in CASES if case[4] is None or case[4] <= GROUP), SLABS]
KINDS = ("int8", "int4", "int4-int8")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
pytestmark = pytest.mark.skipif(KERNEL.machine_obstacle() is not None, reason="no compiler, or no AVX-512 VNNI")


class Unpacked(CompiledA8Kernel):
    """Leaves weights as they were loaded, for a reference to read."""

    def pack(self, w13: torch.Tensor, w2: torch.Tensor, layout: RaggedLayout, scales: Scales | None = None) -> None:
        return


def rounded(rows: torch.Tensor, group: int) -> torch.Tensor:
    """The values of rows [n, K] in fp64 once rounded: 127 steps to the largest of every `group` columns."""
    parts = []
    for part in rows.split(group, 1):
        step = part.abs().amax(1, keepdim=True).clamp(min=1e-30) / 127
        parts.append((part / step).round().double() * step)
    return torch.cat(parts, 1)


def expected(x: torch.Tensor, routes: Routes, experts: ExpertRows) -> torch.Tensor:
    """The arithmetic of `integers.h` in fp64: x rounded, then silu(gate) * up likewise, and down in 8 bits by slabs.

    If down has 4 bits, silu(gate) * up times its scales. Before that it is in bfloat16 if x is, else in float32.
    """
    kept, hidden_size = torch.bfloat16 if x.dtype == torch.bfloat16 else torch.float32, x.shape[1]
    assert experts.scales is not None
    groups = experts.scales.w13.shape[1]
    x = rounded(x.float(), torch.gcd(torch.tensor(GROUP), torch.tensor(hidden_size // groups)).item())
    total = torch.zeros(x.shape, dtype=torch.float64)
    for slot, (row, width) in enumerate(experts.table.tolist()):
        w13, w2 = expert_weights(experts, slot, row, width)
        gate, up = (x @ w13.double().T).chunk(2, -1)
        h = (F.silu(gate) * up).to(kept).float()
        route = (routes.weights * (routes.slots[routes.ids] == slot)).sum(-1).double()
        if experts.scales.is_by_channel(hidden_size):
            total += route[:, None] * (rounded(h, GROUP) @ w2.double())
            continue
        if not experts.is_packed:
            total += route[:, None] * (rounded(h, GROUP) @ rounded_slabs(w2, "int", GROUP).double())
            continue
        codes = unpack_nibbles(experts.w2[row : row + width]).double()
        scales = experts.scales.w2[row : row + width]
        for group, columns in enumerate(codes.split(hidden_size // groups, 1)):
            outputs = slice(group * columns.shape[1], (group + 1) * columns.shape[1])
            total[:, outputs] += route[:, None] * (rounded(h * scales[:, group], GROUP) @ columns)
    return total


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", A8_CASES, ids=lambda case: f"T{case[0]}-H{case[3]}-g{case[4]}")
def test_arithmetic(case: tuple, dtype: torch.dtype, kind: str) -> None:
    """Against the same rounding in fp64, and against none: rounding costs 1 to 2 %, with scales by slab up to 3 %."""
    built, plain = (layer(case, dtype, kind, kernel) for kernel in (KERNEL, Unpacked()))
    output, wanted = built.run(), expected(built.x, plain.routes, plain.experts)
    own_rounding = 8e-3 if dtype == torch.bfloat16 else 3e-3  # of the output; h may fall to another integer
    assert (output - wanted).norm() <= own_rounding * wanted.norm()
    limit = 2.1e-2 if kind == "int4" else 3e-2
    assert (output - built.expected).norm() <= limit * built.expected.norm()
    assert torch.equal(output, built.run()), "not repeatable"


@pytest.mark.parametrize("tokens", [1, 3, 8, 20, 97])
@pytest.mark.parametrize("group_size", [32, 128, None])
def test_sums_of_integers_are_exact(group_size: int | None, tokens: int) -> None:
    def run(x: torch.Tensor, experts: ExpertRows, layout: RaggedLayout) -> torch.Tensor:
        KERNEL.pack(experts.w13, experts.w2, layout, experts.scales)
        slots, table = KERNEL.index_tables([0], layout)
        routes = Routes(torch.ones(tokens, 1), torch.zeros(tokens, 1, dtype=torch.int32), slots)
        output = torch.empty_like(x)
        KERNEL.run(output, x, routes, replace(experts, table=table))
        return output

    check_largest_sums(run, tokens, group_size)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", A8_CASES[3:9], ids=lambda case: f"T{case[0]}-H{case[3]}-g{case[4]}")
def test_rows_and_threads_do_not_change_results(case: tuple, kind: str) -> None:
    built = layer(case, torch.bfloat16, kind, KERNEL)
    singly = [built.run(slice(token, token + 1)) for token in range(min(case[0], 9))]
    assert torch.equal(torch.cat(singly), built.run()[: len(singly)])
    outputs = outputs_by_threads(built.run)
    assert torch.equal(outputs[0], outputs[1]) and torch.equal(outputs[0], outputs[2])


@pytest.mark.parametrize("case", [CASES[3], SLABS], ids=["channel", "slabs"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_what_is_no_number_shows(value: float, case: tuple) -> None:
    """It must not vanish in the rounding; other tokens do not see it."""
    built = layer(case, torch.bfloat16, "int8", KERNEL)
    clean = built.run()
    built.x[1, 5] = value
    output = built.run()
    assert not output[1].isfinite().any()
    others = torch.arange(len(output)) != 1
    assert torch.equal(output[others], clean[others])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", [CASES[6], SLABS], ids=str)
def test_traffic_is_that_of_exact_hidden_activations(case: tuple, kind: str) -> None:
    """In bf16, with only x rounded."""
    built = layer(case, torch.bfloat16, kind, KERNEL)
    exact = layer(case, torch.float32, kind, ReferenceKernel())
    sums = []
    for each in (built, exact):
        with_traffic = each._replace(experts=replace(each.experts, traffic=no_traffic(each.experts)))
        each.kernel.run(torch.empty_like(each.x), each.x, each.routes, with_traffic.experts)
        sums.append(by_expert(with_traffic, max(case[1])))
    (found, tokens), (wanted, wanted_tokens) = sums
    assert torch.equal(tokens, wanted_tokens)
    assert (found - wanted).norm() <= 3e-2 * wanted.norm()


def test_packing_again_gives_the_same_bits() -> None:
    """A reload fills the parameters with codes and scales of the checkpoint, whatever packing made of the last ones."""
    plain, packed = (layer(SLABS, torch.bfloat16, "int8", kernel).experts for kernel in (Unpacked(), KERNEL))
    again = layer(SLABS, torch.bfloat16, "int8", KERNEL).experts
    assert plain.scales is not None and packed.scales is not None and again.scales is not None
    for stale, fresh in (
        (again.w13, plain.w13),
        (again.w2, plain.w2),
        (again.scales.w13, plain.scales.w13),
        (again.scales.w2, plain.scales.w2),
    ):
        stale.copy_(fresh)
    KERNEL.pack(again.w13, again.w2, RaggedLayout.build(SLABS[1], KERNEL.stored_widths(SLABS[1])), again.scales)
    assert torch.equal(again.w13, packed.w13) and torch.equal(again.w2, packed.w2)
    for one, other in ((again.scales.w13, packed.scales.w13), (again.scales.w2, packed.scales.w2)):
        assert torch.equal(one.view(torch.int32), other.view(torch.int32))


def test_scales_without_room_are_refused() -> None:
    built = layer(SLABS, torch.bfloat16, "int8", KERNEL)
    table = built.experts.table.clone()
    table[-1, 1] = 16
    with pytest.raises(RuntimeError, match="width 16 leaves no room for scales by slab"):
        built._replace(experts=replace(built.experts, table=table)).run()


def test_neurons_without_weights_do_not_coarsen_the_others_in_4_bits() -> None:
    """Their scale is 1, a thousand times that of others, whose activations would all be rounded to 0 beside theirs."""
    tokens, hidden, width = 9, 128, 64
    scheme, generator = scheme_of("int4"), torch.Generator().manual_seed(0)
    gate_up = torch.randn(2 * width, hidden, generator=generator) * 0.1
    down = torch.randn(hidden, width, generator=generator) * 0.1
    down[:, ::2] = 0
    (w13, w13_scale), (w2, w2_scale) = scheme.quantize(gate_up, "w13"), scheme.quantize(down, "w2")
    x = torch.randn(tokens, hidden, generator=generator)
    gate, up = (x @ scheme.dequantize(w13, w13_scale, "w13").T).chunk(2, -1)
    wanted = (F.silu(gate) * up) @ scheme.dequantize(w2, w2_scale, "w2").T
    layout = RaggedLayout.build([width], [width])
    w2, w2_scale = w2.T.contiguous(), w2_scale.T.contiguous()
    KERNEL.pack(w13, w2, layout, Scales(w13_scale, w2_scale))
    slots, table = KERNEL.index_tables([0], layout)
    routes = Routes(torch.ones(tokens, 1), torch.zeros(tokens, 1, dtype=torch.int32), slots)
    output = torch.empty_like(x)
    KERNEL.run(output, x, routes, ExpertRows(w13, w2, table, width, scales=Scales(w13_scale, w2_scale)))
    assert (output - wanted).norm() <= 2e-2 * wanted.norm()


def test_stored_widths_have_room_for_scales() -> None:
    assert KERNEL.stored_widths([0, 1, 64, 70]) == [0, 64, 64, 80]


def test_layers_that_it_runs() -> None:
    for kind in KINDS:
        assert KERNEL.layer_obstacle(torch.bfloat16, 256, scheme_of(kind)) is None
    scheme = ExpertScheme("int")
    for dtype, other, message in (
        (torch.float32, scheme, "computes in float32; choose compiled"),
        (torch.bfloat16, replace(scheme, type="float"), "not fp8 ones; choose compiled"),
        (torch.bfloat16, None, "not unquantized ones; choose compiled"),
        (torch.bfloat16, replace(scheme, group_size=256), "groups of at most 128, not 256; choose compiled"),
    ):
        assert (KERNEL.layer_obstacle(dtype, 256, other) or "").endswith(message)
    assert build.has_vnni()
