# SPDX-License-Identifier: Apache-2.0
"""How an exported checkpoint holds the expert tensors: cut to the kept neurons, or full-size and zeroed.

A plain checkpoint is cut too; all experts have one width there, which the model's own config says.
"""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from heapr_vllm.errors import HeaprError
from heapr_vllm.formats.masks import NeuronMasks
from heapr_vllm.formats.names import ExpertTensor
from heapr_vllm.formats.quantized import BITWISE, SCALE_SUFFIX

PROJECTIONS = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}


@dataclass(frozen=True)
class Layout(ABC):
    """A stage of the export that prunes; tensors that `masks` do not name pass as they are."""

    masks: NeuronMasks

    @abstractmethod
    def tensors(self, name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
        """Turns one tensor of the base checkpoint into those of the exported one, by name."""


class Compact(Layout):
    """Every expert has its kept width; a stacked tensor becomes one tensor per expert and projection."""

    def tensors(self, name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
        where = ExpertTensor.parse(name.removesuffix(SCALE_SUFFIX))
        if where is None:
            return {name: tensor}
        return {
            part_name: self._kept(part, place, name.endswith(SCALE_SUFFIX))
            for part_name, part, place in _per_expert(name, tensor, where)
        }

    def _kept(self, tensor: torch.Tensor, where: ExpertTensor, is_scale: bool) -> torch.Tensor:
        if where.prefix not in self.masks.keep:
            return tensor
        keep = self.masks.keep[where.prefix][where.expert]
        axis = 1 if where.shard == "w2" else 0
        if tensor.shape[axis] != len(keep) and is_scale and where.shard == "w2":
            return tensor  # by channel: one per output, whatever neurons there are
        bits = tensor.view(BITWISE) if tensor.itemsize == 1 else tensor
        return bits.index_select(axis, keep.nonzero().flatten()).view(tensor.dtype)


class Zeroed(Layout):
    """Every tensor has its full size, with the pruned neurons zeroed: any engine loads it."""

    def tensors(self, name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
        where = ExpertTensor.parse(name)
        if where is None or where.prefix not in self.masks.keep:
            return {name: tensor}
        keep = self.masks.keep[where.prefix]
        if where.expert is not None:
            keep = keep[where.expert]
        if where.shard == "w13":
            keep = torch.cat([keep, keep], -1)
        bits = tensor.view(BITWISE) if tensor.itemsize == 1 else tensor
        zeroed = bits.masked_fill(~(keep[..., None, :] if where.shard == "w2" else keep[..., None]), 0)
        return {name: zeroed.view(tensor.dtype)}


class Expanded(Layout):
    """Every tensor of a compact checkpoint gets its full size, the same as `Zeroed` makes of the base model."""

    def tensors(self, name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
        return {name: self.masks.expanded(name, tensor)}


LAYOUTS: dict[str, type[Layout]] = {"compact": Compact, "plain": Compact, "zeroed": Zeroed}
FORMER_NAMES = {"masked": "zeroed"}


def current_name(layout: str) -> str:
    """Returns the name of a layout, with a note on stderr for a former one. Raises HeaprError if there is none such."""
    if layout in FORMER_NAMES:
        print(f"heapr: layout {layout} is called {FORMER_NAMES[layout]} now", file=sys.stderr)
        return FORMER_NAMES[layout]
    if layout not in LAYOUTS:
        raise HeaprError(f"layout {layout!r} is not one of {', '.join(LAYOUTS)}")
    return layout


def _per_expert(
    name: str, tensor: torch.Tensor, where: ExpertTensor
) -> Iterator[tuple[str, torch.Tensor, ExpertTensor]]:
    """Yields name, tensor and place of every expert's part of a routed expert tensor."""
    if where.expert is not None:
        yield name, tensor, where
        return
    shards = {"w2": tensor} if where.shard == "w2" else dict(zip(("w1", "w3"), tensor.chunk(2, dim=1), strict=True))
    for shard, stack in shards.items():
        for expert, part in enumerate(stack):
            place = ExpertTensor(where.prefix, expert, shard)
            yield f"{where.prefix}.{expert}.{PROJECTIONS[shard]}.weight", part, place
