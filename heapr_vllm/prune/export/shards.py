# SPDX-License-Identifier: Apache-2.0
"""Weights from one checkpoint to another, shard by shard through stages; the model is never instantiated."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import torch
from safetensors.torch import save_file

from heapr_vllm.formats.checkpoint import INDEX_FILE, Checkpoint
from heapr_vllm.formats.reader import TensorReader
from heapr_vllm.progress import progress


class Stage(Protocol):
    """One step on the way of a tensor from the base checkpoint to the exported one."""

    def tensors(self, name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
        """Turns one tensor into those that the next stage gets, by name."""
        ...


class ShardWriter:
    """Shards in a folder, and their index."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.total_size = 0
        self.weight_map: dict[str, str] = {}

    def add(self, shard: str, tensors: dict[str, torch.Tensor]) -> None:
        """Writes the shard file named `shard`."""
        save_file(tensors, self.folder / shard, metadata={"format": "pt"})
        self.weight_map |= dict.fromkeys(tensors, shard)
        self.total_size += sum(tensor.nbytes for tensor in tensors.values())

    def write_index(self) -> None:
        """Writes the index of all shards so far."""
        index = {"metadata": {"total_size": self.total_size}, "weight_map": dict(sorted(self.weight_map.items()))}
        (self.folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n")


def write_shards(
    base: Checkpoint,
    stages: Sequence[Stage],
    folder: Path,
    *,
    dtype: torch.dtype = torch.bfloat16,
    is_verbatim: Callable[[str], bool] = lambda name: False,
) -> None:
    """Writes the tensors of `base` into `folder`, after they went through `stages`, in as many shards, and the index.

    Quantized weights come in as `dtype`, or, where `is_verbatim` says so of their name, as `TensorReader.verbatim` has
    them, codes and their scales.
    Raises HeaprError if a shard, codes or scales are damaged.
    """
    writer = ShardWriter(folder)
    for shard, names in progress(base.shards.items(), unit="shard", desc="exporting"):
        tensors: dict[str, torch.Tensor] = {}
        with TensorReader(base, dtype) as reader:
            for name in names:
                weight = base.weight_of(name) or name
                if is_verbatim(weight):
                    for stored, tensor in reader.verbatim(name).items():
                        tensors |= through(stages, stored, tensor)
                elif weight == name:
                    tensors |= through(stages, name, reader.tensor(name))
        writer.add(shard, tensors)
    writer.write_index()


def through(stages: Sequence[Stage], name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    """Sends a tensor through `stages`; a stage gets every tensor that the one before it made."""
    tensors = {name: tensor}
    for stage in stages:
        made = [stage.tensors(name, tensor) for name, tensor in tensors.items()]
        tensors = {}
        for part in made:
            tensors |= part
    return tensors
