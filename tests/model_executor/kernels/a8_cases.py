# SPDX-License-Identifier: Apache-2.0
"""The table of edge cases for kernels that round activations to 8 bits, and their arithmetic in float64."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import NamedTuple
from unittest.mock import patch

import numpy as np
import torch
import torch.nn.functional as F
import triton.language as tl
from triton.runtime import interpreter

from heapr_vllm.formats.quantized import LARGEST_CODE, ExpertScheme, dequantize
from heapr_vllm.model_executor.kernels.base import ExpertRows
from heapr_vllm.model_executor.kernels.reference import expert_weights
from heapr_vllm.model_executor.kernels.triton.a8_launch import A8
from heapr_vllm.model_executor.kernels.triton.launch import triton_ragged_moe
from heapr_vllm.model_executor.kernels.triton.tiles import TileConfig, largest_divisor
from heapr_vllm.model_executor.storage.layout import RaggedLayout, round_up
from tests.model_executor.kernels import moe_cases
from tests.model_executor.kernels.moe_cases import CASES, DECODE, SMALL, WIDE, Case, Layer, copied, fenced
from tests.model_executor.kernels.slabs import rounded_slabs

SLAB = 64  # neurons whose activations share a scale
GROUP = 128  # inputs, at most, that do
LIMIT = {"int": 1e-3, "float": 8e-3}  # of errors
FLIPPED = 32  # one token in so many may have an activation nearly half-way, which falls to another code than in float64


class RoundedLayer(NamedTuple):
    """A layer packed for rounded activations; `layer.plain` are its experts before."""

    layer: Layer
    kind: str

    def run(self, config: TileConfig | None) -> torch.Tensor:
        """The kernels' output, into memory full of NaN."""
        output = fenced(torch.full_like(self.layer.x, torch.nan))
        with right_e4m3():
            triton_ragged_moe(output, *self.layer.inputs, config=config, steps=A8)
        return output

    def expected(self) -> torch.Tensor:
        """Tokens rounded, then silu(gate) * up, times `w2` rounded again: [T, H] in float64."""
        layer, hidden_size = self.layer, self.layer.x.shape[1]
        route_slots = layer.routes.slots.new_tensor(layer.plain_slots.tolist())[layer.routes.ids.flatten()]
        x = rounded(layer.x.float(), group_of(layer.plain), self.kind)
        output = torch.zeros(x.shape, dtype=torch.float64, device=x.device)
        for slot, (row, width) in enumerate(layer.plain.table.tolist()):
            chosen = (route_slots == slot).nonzero().flatten()
            token = chosen // layer.routes.ids.shape[1]
            w13, w2 = expert_weights(layer.plain, slot, row, width)
            gate, up = (x[token] @ w13.double().T).chunk(2, -1)
            hidden = rounded((F.silu(gate) * up).float(), SLAB, self.kind)
            if not layer.plain.scales.is_by_channel(hidden_size):
                w2 = rounded_slabs(w2, self.kind, SLAB)
            output.index_add_(0, token, hidden @ w2.double() * layer.routes.weights.flatten()[chosen, None])
        return output

    def error(self, output: torch.Tensor) -> float:
        """Largest deviation relative to the largest output; infinite if anything is NaN.

        That of tokens with an activation on the other side of half-way counts a tenth.
        """
        expected = self.expected()
        errors = (output.double() - expected).abs().amax(1) / expected.abs().max().clamp(min=1e-9)
        errors = errors.nan_to_num(torch.inf).sort(descending=True).values
        errors[: len(errors) // FLIPPED] /= 10
        return float(errors.max())


@contextmanager
def right_e4m3() -> Iterator[None]:
    """Triton's interpreter rounds to E4M3 without carrying into the exponent; torch does it instead."""
    original = interpreter._convert_float

    def convert(data: np.ndarray, source: tl.dtype, target: tl.dtype, mode: object) -> np.ndarray:
        if (source, target) != (tl.float32, tl.float8e4nv):
            return original(data, source, target, mode)
        codes = torch.from_numpy(data.view(np.float32).copy()).to(torch.float8_e4m3fn)
        return codes.view(torch.uint8).numpy()

    with patch.object(interpreter, "_convert_float", convert):
        yield


def build(case: Case, dtype: torch.dtype) -> RoundedLayer:
    """A layer of `moe_cases`, packed anew."""
    layer = moe_cases.build(case, dtype)
    local = [width if expert not in case.remote else 0 for expert, width in enumerate(case.widths)]
    layout = RaggedLayout.build(local, [round_up(width, SLAB) for width in local])
    experts = copied(layer.plain, torch.clone)
    A8.pack(experts.w13, experts.w2, layout, experts.scales)
    experts = replace(copied(experts, fenced), table=layer.experts.table)
    return RoundedLayer(layer._replace(experts=experts), case.scheme.type)


def group_of(plain: ExpertRows) -> int:
    """How many inputs share a scale once rounded."""
    return largest_divisor(plain.w13.shape[1] // plain.scales.w13.shape[1], GROUP)


def rounded(rows: torch.Tensor, group: int, kind: str) -> torch.Tensor:
    """The values of float32 rows [n, K] in float64 once rounded, by `group` columns."""
    codes, scale = codes_of(rows, group, kind)
    return codes.double() * scale.double().repeat_interleave(group, 1)


def codes_of(rows: torch.Tensor, group: int, kind: str) -> tuple[torch.Tensor, torch.Tensor]:
    """(codes [n, K], scales [n, K / group]): the largest magnitude of a group gets the largest code."""
    parts = rows.unflatten(1, (-1, group))
    largest = parts.abs().amax(-1, keepdim=True)
    steps = parts * (LARGEST_CODE[kind] / largest.clamp(min=1e-30))
    codes = steps.round().to(torch.int8) if kind == "int" else steps.to(torch.float8_e4m3fn)
    return codes.flatten(1), (largest / LARGEST_CODE[kind])[..., 0]


def of_codes(case: Case, kind: str, strategy: str, group_size: int | None = None) -> Case:
    """The case with experts as codes in the largest groups there are, and tiles for rounded activations."""
    group_size = group_size or largest_divisor(case.hidden_size, GROUP)
    scheme = ExpertScheme(kind, strategy=strategy, group_size=group_size if strategy == "group" else None)
    config = case.config
    if config:
        group = largest_divisor(group_size if strategy == "group" else case.hidden_size, GROUP)
        up = replace(config.up, block_n=SLAB, block_k=group, tma=False)
        down = replace(config.down, block_k=SLAB, tma=False)
        config = replace(config, up=up, down=down, fused=True)
    return case._replace(config=config, scheme=scheme)


A8_CASES = [
    *(of_codes(case, kind, how) for case in CASES for kind in ("int", "float") for how in moe_cases.STRATEGIES),
    of_codes(Case(9, [64, 192], 2, 192), "int", "group", 96),  # groups of three steps
    of_codes(Case(9, [64, 192], 2, 256, WIDE), "float", "group", 64),  # several groups of one step
    of_codes(Case(9, [64, 192], 2, 256, WIDE), "int", "group", 32),
    of_codes(Case(5, [128, 64], 2, 384, DECODE), "float", "channel"),  # several steps without scales
    of_codes(Case(70, [192, 64], 2, 128, replace(WIDE, block_m=64)), "float", "group"),  # not swapped
]
FEW_A8_CASES = [
    of_codes(Case(2, [64, 128] * 3, 2, 128, DECODE, (3, 5), "nobody"), "int", "group", 64),
    of_codes(Case(6, [64, 0, 192], 2, 192, WIDE), "float", "group", 96),
    of_codes(Case(2, [64, 128], 1, 1280, DECODE), "int", "channel"),  # rounded by two programs per token
    of_codes(Case(33, [64, 64, 128], 2, 256, WIDE, (0,), "nobody"), "float", "channel"),
    of_codes(Case(40, [64, 192, 128], 2, 128, SMALL, (), "skewed"), "int", "group", 64),
]  # what `tools/mutants.py` has time for


def stored_codes(experts: ExpertRows) -> torch.Tensor:
    """Down projections [rows, H] in float32, from codes and scales in groups."""
    hidden_size = experts.w2.shape[1]
    return dequantize(experts.w2, experts.scales.w2, (1, hidden_size // experts.scales.w2.shape[1]))
