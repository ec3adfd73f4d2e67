# SPDX-License-Identifier: Apache-2.0
"""Neurons as blocks of `align` that stay or go together."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from heapr_vllm.errors import HeaprError
from heapr_vllm.formats.names import natural_order

SCOPES = ("global", "layer", "expert", "layer-uniform", "uniform")
SHARED_WIDTHS = ("layer-uniform", "uniform")  # scopes whose experts keep as many as the others of the layer or model


@dataclass(frozen=True)
class NeuronBlocks:
    """All B blocks of a model: layers in natural order, then experts, then blocks by falling saliency.

    `order`: prefix -> int64 [E, I], the neurons of every expert by falling saliency, `align` in a row being a block.
    `saliency`: float64 [B], mean over the block, infinite where it must stay. `frequency`: float64 [B], how often the
    block's expert runs, 1 for the average expert of the model.
    """

    order: dict[str, torch.Tensor]
    saliency: torch.Tensor
    frequency: torch.Tensor
    align: int

    @classmethod
    def build(
        cls,
        saliency: dict[str, torch.Tensor],
        align: int,
        floors: dict[str, torch.Tensor],
        tokens: dict[str, torch.Tensor] | None = None,
    ) -> NeuronBlocks:
        """Sorts `saliency`, prefix -> [E, I]. At least `floors`, prefix -> int64 [E], neurons of every expert stay.

        `tokens`: prefix -> int64 [E], tokens routed to each expert; None if no cost is asked for. Raises HeaprError if
        `align` does not divide a width, or on NaN.
        """
        order, means, frequencies = {}, [], []
        total = 1.0 if tokens is None else sum(int(count.sum()) for count in tokens.values())
        num_experts = sum(len(scores) for scores in saliency.values())
        for prefix in sorted(saliency, key=natural_order):
            scores = saliency[prefix].double()
            if scores.isnan().any():
                raise HeaprError(f"{prefix} has NaN saliency; calibrate again in float32")
            experts, width = scores.shape
            if width % align:
                raise HeaprError(
                    f"align {align} does not divide the {width} neurons of {prefix}; "
                    f"use --align {torch.gcd(torch.tensor(align), torch.tensor(width)).item()}"
                )
            ranked, order[prefix] = scores.sort(dim=-1, descending=True, stable=True)
            blocks = ranked.view(experts, width // align, align).mean(-1)
            blocks[torch.arange(width // align) < (-(-floors[prefix] // align))[:, None]] = torch.inf
            count = torch.ones(experts) if tokens is None else tokens[prefix] * (num_experts / max(total, 1))
            means.append(blocks.flatten())
            frequencies.append(count.double().repeat_interleave(width // align))
        return cls(order, torch.cat(means), torch.cat(frequencies), align)

    def columns(self, scope: str) -> torch.Tensor:
        """Numbers what stays or goes together in a scope of `SHARED_WIDTHS`, int64 [B].

        A column is the j-th most salient block of all experts of a layer, or of the model. Raises HeaprError if layers
        differ in the number of their experts or neurons, so that columns are not of one size.
        """
        shapes = {tuple(neurons.shape) for neurons in self.order.values()}
        if len(shapes) > 1:
            raise HeaprError(
                f"layers have experts of shapes {sorted(shapes)}, which no scope {scope} covers; use --scope layer"
            )
        ((experts, width),) = shapes
        column = torch.arange(width // self.align).repeat(experts)
        first = torch.arange(len(self.order)) * (width // self.align if scope == "layer-uniform" else 0)
        return (first[:, None] + column).flatten()

    def groups(self, scope: str) -> list[slice]:
        """Groups blocks that compete with each other."""
        sizes = [(len(neurons), neurons.shape[1] // self.align) for neurons in self.order.values()]
        if scope == "global":
            lengths = [len(self.saliency)]
        elif scope == "layer":
            lengths = [experts * blocks for experts, blocks in sizes]
        else:
            lengths = []
            for experts, blocks in sizes:
                lengths += [blocks] * experts
        ends = torch.tensor(lengths).cumsum(0).tolist()
        return [slice(end - length, end) for end, length in zip(ends, lengths, strict=True)]

    def totals(self, values: dict[str, torch.Tensor]) -> torch.Tensor:
        """Sums per-neuron `values`, prefix -> [E, I], over each block: float64 [B]."""
        sums = []
        for prefix, neurons in self.order.items():
            ranked = values[prefix].double().gather(1, neurons)
            sums.append(ranked.view(-1, self.align).sum(-1))
        return torch.cat(sums)

    def masks(self, kept: torch.Tensor) -> dict[str, torch.Tensor]:
        """Turns `kept` bool [B] into prefix -> bool [E, I]."""
        masks: dict[str, torch.Tensor] = {}
        for prefix, part in self._per_layer(kept).items():
            order = self.order[prefix]
            ranked = part.repeat_interleave(self.align, -1)
            masks[prefix] = torch.zeros(order.shape, dtype=torch.bool).scatter_(1, order, ranked)
        return masks

    def kept_per_expert(self, kept: torch.Tensor) -> torch.Tensor:
        """Counts the blocks each expert keeps, int64 [sum of E], from `kept` bool [B]."""
        return torch.cat([part.sum(-1) for part in self._per_layer(kept).values()])

    def _per_layer(self, kept: torch.Tensor) -> dict[str, torch.Tensor]:
        """Cuts `kept` bool [B] into prefix -> bool [E, I / align]."""
        parts = kept.split([neurons.numel() // self.align for neurons in self.order.values()])
        experts = [len(neurons) for neurons in self.order.values()]
        layers = [part.view(count, -1) for part, count in zip(parts, experts, strict=True)]
        return dict(zip(self.order, layers, strict=True))
