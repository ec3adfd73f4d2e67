# SPDX-License-Identifier: Apache-2.0
"""Experts of one layer stored in 8 or 4 bits: codes and scales, kept from the checkpoint or made while it is loaded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from vllm.model_executor.utils import set_weight_attrs

from heapr_vllm.errors import HeaprError
from heapr_vllm.formats.base_quantization import BaseQuantization
from heapr_vllm.formats.quantized import (
    BITWISE,
    PACKED_DTYPE,
    SCALE_SUFFIX,
    ExpertScheme,
    check_codes,
    check_scale,
    unpack_nibbles,
)
from heapr_vllm.model_executor.pruned_layer import PrunedLayer
from heapr_vllm.model_executor.storage.dense import DenseStorage, Element
from heapr_vllm.model_executor.storage.layer_masks import LayerMasks
from heapr_vllm.model_executor.storage.layout import RaggedLayout
from heapr_vllm.model_executor.storage.scales import Scales

SCALED = ("w13", "w2")


class QuantizedStorage(DenseStorage):
    """This rank's experts of a layer as codes, with `scales` beside them.

    scheme: how they are stored. base: format of the full-size codes that masks slice; None for those of a compact
    checkpoint, and for weights in the model's dtype, which are rounded row by row as they come. Codes of a base model
    of 4 bits come as the scheme has them (`unpacking.py`). widens: whether gate and up come in 4 bits for one of 8.
    """

    def __init__(
        self,
        masks: LayerMasks,
        local_ids: dict[int, int],
        shares: list[tuple[int, int]],
        layout: RaggedLayout,
        scheme: ExpertScheme,
        base: BaseQuantization | None,
        *,
        widens: bool = False,
    ) -> None:
        super().__init__(masks, local_ids, shares, layout)
        self.scheme = scheme
        self.widens = widens
        self.base = base if base is None or base.packing is None else None
        self.rounds = base is None and not masks.is_compact
        self.settled: Scales | None = None

    def create(
        self,
        layer: PrunedLayer,
        hidden_size: int,
        dtype: torch.dtype,
        loader: Callable[..., bool | None],
        attributes: dict[str, Any],
    ) -> None:
        """Registers codes as `w13_weight` and `w2_weight`, and scales under the names that the checkpoint has.

        Raises HeaprError if the scheme does not fit the hidden size.
        """
        self.scheme.check(hidden_size)
        super().create(layer, hidden_size, dtype, loader, attributes)
        self.layer, self.hidden_size = layer, hidden_size
        for name, shape, loaded in zip(SCALED, self._scale_shapes(hidden_size), self._loaded(hidden_size), strict=True):
            scale = torch.ones(shape, dtype=torch.float32)
            if self.rounds:  # no tensor of the checkpoint fills them, and vLLM wants one for every parameter
                layer.register_buffer(self._scale_name(name), scale, persistent=False)
            else:
                layer.register_parameter(self._scale_name(name), nn.Parameter(scale, requires_grad=False))
            wanted = {**attributes, "weight_loader": loader, "weight_loader_numel": loaded}
            set_weight_attrs(getattr(layer, self._scale_name(name)), wanted)

    def _element(self, matrix: str, dtype: torch.dtype) -> Element:
        own = self.scheme.of(matrix)
        return Element(own.code_dtype, own.codes_per_byte, own.zero_byte)

    def _scale_name(self, matrix: str) -> str:
        return f"{matrix}_weight{self.base.scale_suffix if self.base else SCALE_SUFFIX}"

    def _scale_shapes(self, hidden_size: int) -> tuple[tuple[int, int], tuple[int, int]]:
        rows = self.layout.num_rows
        if self.scheme.group_size is None:
            return (2 * rows, 1), (self.layout.num_slots, hidden_size)
        groups = hidden_size // self.scheme.group_size
        return (2 * rows, groups), (rows, groups)

    def _loaded(self, hidden_size: int) -> tuple[int, int]:
        """Elements of both scales that loading fills."""
        neurons = sum(self.layout.widths)
        if self.scheme.group_size is None:
            return 2 * neurons, sum(map(bool, self.layout.widths)) * hidden_size
        groups = hidden_size // self.scheme.group_size
        return 2 * neurons * groups, neurons * groups

    def scales(self, layer: PrunedLayer) -> Scales:
        """Returns the scales of a layer, which reloading replaces."""
        return Scales(*(getattr(layer, self._scale_name(name)) for name in SCALED))

    def settle_scales(self, layer: PrunedLayer) -> None:
        """Copies scales that were made while loading again to where the first ones lie.

        `reload_weights` puts the first buffers back on the layer, since no checkpoint has tensors for them.
        """
        if not self.rounds:
            return
        packed = self.scales(layer)
        if self.settled is None:
            self.settled = packed
        for first, new in ((self.settled.w13, packed.w13), (self.settled.w2, packed.w2)):
            if first is not new:
                first.copy_(new)

    def load(self, param: nn.Parameter, tensor: torch.Tensor, name: str, shard: str, expert: int) -> bool:
        """Copies this rank's share of codes or scales, or rounds its share of weights, into `param`.

        `name`: of the parameter. Raises HeaprError if codes or scales are damaged, of another type or another shape.
        """
        if expert not in self.local_ids:
            return False
        if "scale" in name.rpartition(".")[2]:
            return self._load_scale(param, tensor, name, shard, expert)
        if self.widens and shard != "w2" and tensor.dtype == PACKED_DTYPE:
            tensor = unpack_nibbles(tensor)
        is_codes = tensor.dtype == self.scheme.of(shard).code_dtype
        is_weights = tensor.is_floating_point() and tensor.itemsize > 1
        if not (is_weights if self.rounds else is_codes):
            raise HeaprError(
                f"{name} ({shard} of {self.masks.prefix}.{expert}) is {tensor.dtype}, and its experts are to be "
                f"{self.scheme.name}: {_REMEDY[self.rounds]}"
            )
        if is_codes:
            check_codes(tensor, f"{shard} of {self.masks.prefix}.{expert}")
            return self._copy(param.data.view(BITWISE), tensor.view(BITWISE), name, shard, expert, shard)
        codes, scale = self.scheme.quantize(tensor, shard)
        scales = self.scales(self.layer)
        self._copy(scales.w2 if shard == "w2" else scales.w13, scale, name, shard, expert, shard)
        return self._copy(param.data.view(BITWISE), codes.view(BITWISE), name, shard, expert, shard)

    def _load_scale(self, param: nn.Parameter, scale: torch.Tensor, name: str, shard: str, expert: int) -> bool:
        neurons = self.neurons(expert)
        hidden_size = self.hidden_size
        shape = (hidden_size, neurons) if shard == "w2" else (neurons, hidden_size)
        where = f"{name} ({shard} of {self.masks.prefix}.{expert})"
        wanted = self.base.scale_shape(shape) if self.base else self.scheme.scale_shape(shard, shape)
        check_scale(scale, wanted, where)
        if shard == "w2" and self.scheme.group_size is None:
            slot = self.layout.slots[self.local_ids[expert]]
            if slot < self.layout.num_slots:
                param.data[slot].copy_(scale.flatten())
            self.loaded.add((self.local_ids[expert], "w2_scale"))
            return True
        if self.base is not None:
            scale = self.base.neuron_scale(scale, shard, shape)
        return self._copy(param.data, scale, name, shard, expert, f"{shard}_scale")

    def _wanted(self) -> set[tuple[int, str]]:
        wanted = super()._wanted()
        if not self.rounds:
            wanted |= {(local, f"{shard}_scale") for local, shard in wanted}
        return wanted

    def zero_padding(self, layer: PrunedLayer) -> None:
        """Gives the stored rows beyond every expert's kept neurons code 0 and scale 1."""
        super().zero_padding(layer)
        scales = self.scales(layer)
        for local, width in enumerate(self.layout.widths):
            if self.layout.slots[local] == self.layout.num_slots:
                continue
            row, stored = self.layout.place(local)
            scales.w13[2 * row : 2 * (row + stored)].view(2, stored, -1)[:, width:] = 1
            if self.scheme.group_size is not None:
                scales.w2[row + width : row + stored] = 1


_REMEDY = {
    True: "codes cannot be changed while loading; write a checkpoint with `heapr export --quantize`",
    False: "weights and quantization_config do not belong together; export or download the checkpoint again",
}
