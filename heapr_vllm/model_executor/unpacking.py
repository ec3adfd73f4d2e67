# SPDX-License-Identifier: Apache-2.0
"""Experts of a base model of 4 bits while they are loaded: codes and scales as `heapr export` writes them."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping

import torch

from heapr_vllm.formats.checkpoint import Checkpoint
from heapr_vllm.formats.names import ExpertTensor
from heapr_vllm.formats.quantized import SCALE_SUFFIX


def unpacked(
    tensors: Iterable[tuple[str, torch.Tensor]], base: Checkpoint, held: Mapping[str, Collection[int]]
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields the tensors of `base` as they come, but of experts that masks prune X.weight and X.weight_scale.

    Tensors of such a weight wait until the last of them has come. `held`: prefix -> experts that this rank holds, of
    the others nothing comes. Raises HeaprError if tensors are damaged.
    """
    form = base.base_quantization
    if form is None or form.packing is None:
        yield from tensors
        return
    waiting: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors:
        weight, part = form.packing.part_of(name) or (name, "")
        where = ExpertTensor.parse(weight)
        if where is None or weight not in base.packed or base.is_draft(where.prefix):
            yield name, tensor
            continue
        if where.expert not in held.get(where.prefix, ()):
            continue
        parts = waiting.setdefault(weight, {})
        parts[part] = tensor
        if parts.keys() >= base.packed[weight].keys():
            codes, scale = form.neuron_codes(waiting.pop(weight), where.shard, weight)
            yield weight, codes
            yield weight + SCALE_SUFFIX, scale
