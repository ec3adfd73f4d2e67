# SPDX-License-Identifier: Apache-2.0
"""A checkpoint tensor as the exported checkpoint holds it: cut to the kept neurons, or zeroed."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from heapr_vllm.formats.masks import NeuronMasks
from heapr_vllm.formats.names import ExpertTensor

LAYOUTS = ("compact", "masked")
PROJECTIONS = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}


def compact(name: str, tensor: torch.Tensor, masks: NeuronMasks) -> dict[str, torch.Tensor]:
    """The kept part of a tensor; a stacked expert tensor becomes one tensor per expert and projection."""
    return {
        part_name: _keep(part, where, masks).contiguous() if where and where.prefix in masks.keep else part
        for part_name, part, where in _per_expert(name, tensor)
    }


def _keep(tensor: torch.Tensor, where: ExpertTensor, masks: NeuronMasks) -> torch.Tensor:
    keep = masks.keep[where.prefix][where.expert]
    return tensor[:, keep] if where.shard == "w2" else tensor[keep]


def _per_expert(name: str, tensor: torch.Tensor) -> Iterator[tuple[str, torch.Tensor, ExpertTensor | None]]:
    where = ExpertTensor.parse(name)
    if where is None or where.expert is not None:
        yield name, tensor, where
        return
    shards = {"w2": tensor} if where.shard == "w2" else dict(zip(("w1", "w3"), tensor.chunk(2, dim=1), strict=True))
    for shard, stack in shards.items():
        for expert, part in enumerate(stack):
            yield (
                f"{where.prefix}.{expert}.{PROJECTIONS[shard]}.weight",
                part,
                ExpertTensor(where.prefix, expert, shard),
            )


def zeroed(name: str, tensor: torch.Tensor, masks: NeuronMasks) -> dict[str, torch.Tensor]:
    """The full-size tensor with pruned neurons zeroed."""
    where = ExpertTensor.parse(name)
    if where is not None and where.prefix in masks.keep:
        keep = masks.keep[where.prefix] if where.expert is None else masks.keep[where.prefix][where.expert]
        keep = torch.cat([keep, keep], -1) if where.shard == "w13" else keep
        tensor = tensor * (keep[..., None, :] if where.shard == "w2" else keep[..., None])
    return {name: tensor}
