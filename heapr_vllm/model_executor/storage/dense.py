# SPDX-License-Identifier: Apache-2.0
"""Experts of one layer stored in the model's dtype: parameters, slices of checkpoint tensors, padding."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from vllm.model_executor.utils import set_weight_attrs

from heapr_vllm.errors import HeaprError
from heapr_vllm.model_executor.pruned_layer import PrunedLayer
from heapr_vllm.model_executor.storage.layer_masks import LayerMasks
from heapr_vllm.model_executor.storage.layout import RaggedLayout
from heapr_vllm.model_executor.storage.scales import Scales

SHARDS = ("w1", "w2", "w3")  # gate, down, up, as vLLM calls them


@dataclass(frozen=True)
class Element:
    """An element of a parameter: its type, how many weights are in it, and what it is where they are zero."""

    dtype: torch.dtype
    weights: int = 1
    zero: int = 0


class DenseStorage:
    """This rank's experts of a layer.

    local_ids: global id to local id of the experts that are here.
    shares: [start, stop) of this rank's part of every local expert's kept neurons.
    layout: where the rows of local experts lie.
    """

    def __init__(
        self, masks: LayerMasks, local_ids: dict[int, int], shares: list[tuple[int, int]], layout: RaggedLayout
    ) -> None:
        self.masks = masks
        self.local_ids = local_ids
        self.shares = shares
        self.layout = layout
        self.loaded: set[tuple[int, str]] = set()

    def create(
        self,
        layer: PrunedLayer,
        hidden_size: int,
        dtype: torch.dtype,
        loader: Callable[..., bool | None],
        attributes: dict[str, Any],
    ) -> None:
        """Registers `w13_weight` [2 * rows, H] and `w2_weight` [rows, H], or less of H, which `loader` fills.

        `attributes`: what else vLLM wants to find on the parameters.
        """
        for matrix, rows_per_neuron in (("w13", 2), ("w2", 1)):
            element = self._element(matrix, dtype)
            columns = hidden_size // element.weights
            empty = torch.empty(rows_per_neuron * self.layout.num_rows, columns, dtype=element.dtype)
            weight = nn.Parameter(empty, requires_grad=False)
            layer.register_parameter(f"{matrix}_weight", weight)
            loaded_numel = rows_per_neuron * sum(self.layout.widths) * columns
            set_weight_attrs(weight, {**attributes, "weight_loader": loader, "weight_loader_numel": loaded_numel})

    def _element(self, matrix: str, dtype: torch.dtype) -> Element:
        """Of the parameter of a `matrix`, "w13" or "w2", in a model of `dtype`."""
        return Element(dtype)

    def load(self, param: nn.Parameter, tensor: torch.Tensor, name: str, shard: str, expert: int) -> bool:
        """Copies this rank's share of a checkpoint tensor into `param`; returns whether the expert is here.

        `tensor`: gate ("w1") or up ("w3") [width, H], or down ("w2") [H, width] of the global `expert`; the width is
        the kept one in compact checkpoints and moe_intermediate_size otherwise. Raises HeaprError if it is not.
        """
        if expert not in self.local_ids:
            return False
        if not tensor.is_floating_point() or tensor.itemsize < 2:
            raise HeaprError(
                f"{name} ({shard} of {self.masks.prefix}.{expert}) is {tensor.dtype} although config.json names no "
                "quantization; download or export the checkpoint again"
            )
        return self._copy(param.data, tensor, name, shard, expert, shard)

    def _copy(self, rows: torch.Tensor, tensor: torch.Tensor, name: str, shard: str, expert: int, part: str) -> bool:
        """Copies this rank's share of a tensor with neurons into the rows of a parameter, and notes that `part` came.

        `tensor` and the rest as in `load`; of a local expert.
        """
        by_neuron = tensor.T if shard == "w2" else tensor
        if by_neuron.shape[0] != self.neurons(expert):
            raise HeaprError(
                f"{name} ({shard} of {self.masks.prefix}.{expert}) has {by_neuron.shape[0]} neurons "
                f"instead of {self.neurons(expert)}: weights and masks do not belong together; export again"
            )
        local = self.local_ids[expert]
        start, stop = self.shares[local]
        if start < stop:
            kept = self.masks.keep[expert].nonzero().flatten()
            chosen = by_neuron[start:stop] if self.masks.is_compact else by_neuron[kept[start:stop]]
            self._destination(rows, local, shard).copy_(chosen)
        self.loaded.add((local, part))
        return True

    @property
    def held(self) -> set[int]:
        """Global ids of the experts of which this rank has neurons."""
        return {expert for expert, local in self.local_ids.items() if self.layout.widths[local]}

    def neurons(self, expert: int) -> int:
        """Returns how many neurons of a global expert the checkpoint has."""
        return int(self.masks.keep[expert].sum()) if self.masks.is_compact else self.masks.keep.shape[1]

    def _destination(self, rows: torch.Tensor, local: int, shard: str) -> torch.Tensor:
        """Those `rows` of a parameter that hold the kept neurons of a local expert's gate, up or down."""
        row, stored = self.layout.place(local)
        first = {"w1": 2 * row, "w3": 2 * row + stored, "w2": row}[shard]
        return rows[first : first + self.layout.widths[local]]

    def check_complete(self) -> None:
        """Raises HeaprError if an expert tensor was not loaded; the next load starts anew."""
        missing = sorted(self._wanted() - self.loaded)
        self.loaded.clear()
        if missing:
            local, shard = missing[0]
            expert = next(e for e, i in self.local_ids.items() if i == local)
            raise HeaprError(
                f"the checkpoint lacks {len(missing)} expert tensors, first {shard} of {self.masks.prefix}."
                f"{expert}; export or download it again"
            )

    def _wanted(self) -> set[tuple[int, str]]:
        wanted: set[tuple[int, str]] = set()
        for local, width in enumerate(self.layout.widths):
            if width:
                wanted.update((local, shard) for shard in SHARDS)
        return wanted

    def scales(self, layer: PrunedLayer) -> Scales | None:
        """Returns the factors that codes are multiplied by; None for weights in the model's dtype."""
        return None

    def settle_scales(self, layer: PrunedLayer) -> None:
        """Keeps packed scales where the kernel finds them after a reload too."""

    def zero_padding(self, layer: PrunedLayer) -> None:
        """Zeroes the stored rows beyond every expert's kept neurons, before the kernel packs them."""
        w13, w2 = layer.w13_weight.data, layer.w2_weight.data
        w13_zero, w2_zero = (self._element(matrix, w2.dtype).zero for matrix in ("w13", "w2"))
        for local, width in enumerate(self.layout.widths):
            if self.layout.slots[local] < self.layout.num_slots:
                row, stored = self.layout.place(local)
                w13[2 * row : 2 * (row + stored)].view(2, stored, -1)[:, width:] = w13_zero
                w2[row + width : row + stored] = w2_zero

    def slots(self, num_experts: int) -> list[int]:
        """Storage slot of every global expert, `layout.num_slots` if it is not stored here."""
        slots = [self.layout.num_slots] * num_experts
        for expert, local in self.local_ids.items():
            slots[expert] = self.layout.slots[local]
        return slots
