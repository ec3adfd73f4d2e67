# SPDX-License-Identifier: Apache-2.0
"""Random MoE layers of realistic shape, for tuning and benchmarks: sizes of the paper's models, ragged widths."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import torch

from heapr_vllm.formats.quantized import BITWISE, LARGEST_CODE, NAN_CODE, ZERO_4_BITS, ExpertScheme
from heapr_vllm.model_executor.kernels.base import ExpertRows, Routes, Scales, slots_table
from heapr_vllm.model_executor.kernels.reference import ragged_moe_reference
from heapr_vllm.model_executor.kernels.triton import a8_launch, launch
from heapr_vllm.model_executor.kernels.triton.tiles import TRITON_UNIT, LayerShape
from heapr_vllm.model_executor.storage.layout import RaggedLayout

WIDTH_SPREAD = 0.22


class MoEShape(NamedTuple):
    """One MoE layer of a model, unpruned."""

    num_experts: int
    top_k: int
    hidden_size: int
    moe_intermediate_size: int


PAPER_SHAPES = {
    "Qwen3-30B-A3B": MoEShape(128, 8, 2048, 768),
    "DeepSeekMoE-16B": MoEShape(64, 6, 2048, 1408),
    "Qwen1.5-MoE-A2.7B": MoEShape(60, 4, 2048, 1408),
    "Qwen2-57B-A14B": MoEShape(64, 8, 3584, 2560),
    "tiny": MoEShape(8, 2, 128, 192),  # for a look at the commands without a GPU
}


def ragged_widths(num_experts: int, full: int, sparsity: float, unit: int = TRITON_UNIT, seed: int = 0) -> list[int]:
    """Kept widths of a layer pruned to `sparsity`, multiples of `unit`, in random order.

    Kept fractions are normal quantiles with a standard deviation of WIDTH_SPREAD, cut off at 0 and 1 and shifted to the
    wanted mean: what `heapr prune` leaves inside the layers of the bundled model at 25 % and 50 % (0.08 to 0.32).
    The mean is exact to one unit per layer. Sparsity 0 gives full widths.
    """
    if sparsity == 0:
        return [full] * num_experts
    quantiles = (torch.arange(num_experts, dtype=torch.double) + 0.5) / num_experts
    spread = torch.special.ndtri(quantiles) * WIDTH_SPREAD
    low, high = -2.0, 2.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if (middle + spread).clamp(0, 1).mean() < 1 - sparsity else (low, middle)
    exact = (low + spread).clamp(0, 1) * full / unit
    ends = exact.cumsum(0).round()  # cumulative rounding keeps the total
    units = ends.diff(prepend=ends.new_zeros(1)).long().clamp(max=full // unit)
    order = torch.randperm(num_experts, generator=torch.Generator().manual_seed(seed))
    return (units[order] * unit).tolist()


class Batch(NamedTuple):
    """Tokens of one call: `x` [T, H], `topk_weights` float32 and `topk_ids` int32 [T, k]."""

    x: torch.Tensor
    topk_weights: torch.Tensor
    topk_ids: torch.Tensor


def random_batch(num_tokens: int, shape: MoEShape, dtype: torch.dtype, device: torch.device) -> Batch:
    """Standard normal tokens, uniformly random routing."""
    x = torch.randn(num_tokens, shape.hidden_size, dtype=torch.float32, device=device).to(dtype)
    scores = torch.rand(num_tokens, shape.num_experts, dtype=torch.float32, device=device)
    weights, ids = scores.softmax(-1).topk(shape.top_k)
    return Batch(x, weights, ids.int())


@dataclass(frozen=True)
class SyntheticLayer:
    """Random experts of given stored widths, packed for the Triton kernels, in several copies.

    Copies and fresh routing per call keep weights out of the L2 cache, as other layers do in a model.

    copies: the packed experts. slot_map: their `Routes.slots`.
    plain: experts of copy 0 before packing. plain_slots: their `Routes.slots`.
    dtype: of tokens, and of weights unless a `scheme` says how they are stored in 8 bits.
    steps: which kernels they are packed for.
    """

    moe: MoEShape
    widths: list[int]
    copies: list[ExpertRows]
    slot_map: torch.Tensor
    plain: ExpertRows
    plain_slots: torch.Tensor
    dtype: torch.dtype
    scheme: ExpertScheme | None = None
    steps: launch.Steps = launch.PLAIN

    @classmethod
    def build(
        cls,
        moe: MoEShape,
        widths: list[int],
        dtype: torch.dtype,
        device: torch.device,
        copies: int = 1,
        scheme: ExpertScheme | None = None,
        activation_bits: int | None = None,
    ) -> SyntheticLayer:
        """`widths` are multiples of 64, one per expert, 0 for dead ones."""
        steps = a8_launch.A8 if activation_bits else launch.PLAIN
        layout = RaggedLayout.build(widths, widths)
        make = partial(_random_codes, scheme=scheme) if scheme else partial(_random_rows, dtype=dtype)
        packed = [make(layout, moe.hidden_size, device=device) for _ in range(copies)]
        plain = _cloned(packed[0])
        plain_slots = slots_table(layout.slots, layout).to(device)
        slot_map, table = launch.index_tables(layout.slots, layout)
        for experts in packed:
            steps.pack(experts.w13, experts.w2, layout, experts.scales)
        packed = [replace(experts, table=table.to(device)) for experts in packed]
        return cls(moe, widths, packed, slot_map.to(device), plain, plain_slots, dtype, scheme, steps)

    @property
    def shape(self) -> LayerShape:
        bits = self.steps.activation_bits
        return LayerShape.of(self.widths, self.moe.hidden_size, self.moe.top_k, self.dtype, self.scheme, bits)

    def arguments(self, batch: Batch, copy: int = 0) -> tuple[torch.Tensor, Routes, ExpertRows]:
        """Returns the arguments of `triton_ragged_moe` after `output`."""
        routes = Routes(batch.topk_weights, batch.topk_ids, self.slot_map)
        return batch.x, routes, self.copies[copy % len(self.copies)]

    def expected(self, batch: Batch) -> torch.Tensor:
        """Returns the reference's output [T, H] with the weights of copy 0."""
        routes = Routes(batch.topk_weights, batch.topk_ids, self.plain_slots)
        return ragged_moe_reference(batch.x, routes, self.plain)


def _random_rows(layout: RaggedLayout, hidden_size: int, dtype: torch.dtype, device: torch.device) -> ExpertRows:
    """Normal weights."""
    w13 = torch.empty(2 * layout.num_rows, hidden_size, dtype=dtype, device=device)
    w2 = torch.empty(layout.num_rows, hidden_size, dtype=dtype, device=device)
    for weight in (w13, w2):
        weight.normal_(std=hidden_size**-0.5)
    return ExpertRows(w13, w2, _table(layout, device), layout.max_width)


def _random_codes(layout: RaggedLayout, hidden_size: int, scheme: ExpertScheme, device: torch.device) -> ExpertRows:
    """All codes but NaN, each as likely, and scales that differ."""
    rows, groups = layout.num_rows, hidden_size // (scheme.group_size or hidden_size)
    scales = [(2 * rows, groups), (rows, groups) if scheme.group_size else (layout.num_slots, hidden_size)]
    largest_code = ZERO_4_BITS if scheme.num_bits == 4 else LARGEST_CODE[scheme.type]
    largest = 2 * hidden_size**-0.5 / largest_code
    w13_scale, w2_scale = (torch.empty(shape, device=device).uniform_(0.5, 1).mul_(largest) for shape in scales)
    columns = hidden_size // scheme.codes_per_byte
    w13, w2 = (torch.randint(0, 2 * NAN_CODE, (n, columns), dtype=BITWISE, device=device) for n in (2 * rows, rows))
    for bits in (w13, w2):
        bits += bits >= NAN_CODE  # leaves it out, and its negative by the upper end
    w13, w2 = w13.view(scheme.code_dtype), w2.view(scheme.code_dtype)
    return ExpertRows(w13, w2, _table(layout, device), layout.max_width, scales=Scales(w13_scale, w2_scale))


def _cloned(experts: ExpertRows) -> ExpertRows:
    scales = experts.scales and Scales(experts.scales.w13.clone(), experts.scales.w2.clone())
    return replace(experts, w13=experts.w13.clone(), w2=experts.w2.clone(), scales=scales)


def _table(layout: RaggedLayout, device: torch.device) -> torch.Tensor:
    """int32 [num_slots, 2]: first row and stored width."""
    return torch.tensor(layout.expert_table(), dtype=torch.int32, device=device).view(-1, 2)
