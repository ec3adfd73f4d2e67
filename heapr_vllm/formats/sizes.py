# SPDX-License-Identifier: Apache-2.0
"""Sizes of a checkpoint's weights: as they are, as calibration loads them, as `heapr export` writes them."""

from __future__ import annotations

import math

from heapr_vllm.errors import HeaprError
from heapr_vllm.formats.checkpoint import Checkpoint
from heapr_vllm.formats.names import ExpertTensor

_ITEM_SIZE = {
    "F64": 8,
    "I64": 8,
    "F32": 4,
    "I32": 4,
    "F16": 2,
    "BF16": 2,
    "I16": 2,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "I8": 1,
    "U8": 1,
    "BOOL": 1,
}


def num_bytes(checkpoint: Checkpoint) -> int:
    """Adds up the size of all weights."""
    return sum(tensor_bytes(checkpoint, name) for name in checkpoint.headers)


def dequantized_bytes(checkpoint: Checkpoint) -> int:
    """Adds up the size of all weights with codes as bfloat16."""
    total = 0
    for name, (_, shape) in checkpoint.headers.items():
        if checkpoint.weight_of(name) is None:
            total += 2 * math.prod(shape) if checkpoint.is_codes(name) else tensor_bytes(checkpoint, name)
    return total


def tensor_bytes(checkpoint: Checkpoint, name: str) -> int:
    """Size of a tensor, of a weight of 4 bits with its scales and zero points."""
    total = 0
    for stored in checkpoint.packed.get(name, {name: name}).values():
        dtype, shape = checkpoint.stored_headers[stored]
        total += math.prod(shape) * _item_size(checkpoint, dtype)
    return total


def _item_size(checkpoint: Checkpoint, dtype: str) -> int:
    if dtype not in _ITEM_SIZE:
        raise HeaprError(f"{checkpoint.path} holds tensors of type {dtype}, which is not supported")
    return _ITEM_SIZE[dtype]


def export_bytes(checkpoint: Checkpoint, *, routed_only: bool = False) -> int:
    """Adds up all weights, or those that can be pruned, as `heapr export` would write them unpruned."""
    total = 0
    for name in checkpoint.headers:
        owner = checkpoint.weight_of(name) or name
        if not routed_only or checkpoint.is_pruned_expert(owner):
            total += _exported_bytes(checkpoint, name, owner)
    return total


def _exported_bytes(checkpoint: Checkpoint, name: str, owner: str) -> int:
    """Size of a tensor once exported: scales of experts have every group inside one neuron then."""
    where = ExpertTensor.parse(owner)
    if where is not None and name in checkpoint.packed and checkpoint.is_pruned_expert(owner):
        return _repacked_bytes(checkpoint, name, where.shard)
    if (
        name == owner
        or where is None
        or checkpoint.expert_quantization is None
        or not checkpoint.is_pruned_expert(owner)
    ):
        return tensor_bytes(checkpoint, name)
    shape = checkpoint.headers[owner][1]
    rows, columns = checkpoint.expert_quantization.scheme(checkpoint.hidden_size).scale_shape(where.shard, shape)
    return rows * columns * _item_size(checkpoint, checkpoint.headers[name][0])


def _repacked_bytes(checkpoint: Checkpoint, name: str, shard: str) -> int:
    """Size of an expert's weight of 4 bits once exported, down_proj with float32 scales, the others with their own."""
    base = checkpoint.base_quantization
    assert base is not None and base.packing is not None
    shape = checkpoint.headers[name][1]
    scheme = base.scheme(checkpoint.hidden_size)
    scales = math.prod(scheme.scale_shape(shard, shape))
    own = checkpoint.stored_headers[checkpoint.packed[name][base.packing.scale]][0]
    codes = math.prod(shape) // scheme.of(shard).codes_per_byte
    return codes + scales * _item_size(checkpoint, "F32" if shard == "w2" else own)


def routed_weights(checkpoint: Checkpoint) -> int:
    """Counts the weights that can be pruned."""
    return sum(math.prod(shape) for name, (_, shape) in checkpoint.headers.items() if checkpoint.is_pruned_expert(name))
