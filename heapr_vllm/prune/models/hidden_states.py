# SPDX-License-Identifier: Apache-2.0
"""Hidden states and gradients of a streamed pass, one file each: what has its file is done."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from heapr_vllm.errors import HeaprError


class ActivationStore:
    """Tensors by kind ("input" or "gradient"), layer and batch number, in a folder.

    A file appears whole or not at all when the process is killed. Nothing is flushed to the disk: the operating system
    keeps in memory what fits there.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def path(self, kind: str, layer: int, batch: int) -> Path:
        return self.folder / f"{kind}-{layer:04}-{batch:06}.safetensors"

    def has(self, kind: str, layer: int, batch: int) -> bool:
        return self.path(kind, layer, batch).exists()

    def complete(self, kind: str, layer: int, batches: int) -> bool:
        """Tells whether all of the `batches` batches are there."""
        return all(self.has(kind, layer, batch) for batch in range(batches))

    def last_complete(self, kind: str, layers: int, batches: int) -> int:
        """Finds the highest layer from 0 to `layers`, inclusive, that has all batches; -1 if none has."""
        return next((layer for layer in range(layers, -1, -1) if self.complete(kind, layer, batches)), -1)

    def save(self, kind: str, layer: int, batch: int, tensor: torch.Tensor) -> None:
        path = self.path(kind, layer, batch)
        partial = path.with_suffix(".partial")
        save_file({kind: tensor.cpu().contiguous()}, partial)
        os.replace(partial, path)

    def load(self, kind: str, layer: int, batch: int, device: torch.device | str = "cpu") -> torch.Tensor:
        """Raises HeaprError if the file is damaged, as after a power failure, or missing."""
        path = self.path(kind, layer, batch)
        try:
            with safe_open(path, framework="pt", backend="pread") as file:
                return file.get_tensor(kind).to(device)
        except (SafetensorError, FileNotFoundError) as error:
            raise HeaprError(f"{path} is damaged or missing ({error}); start anew with --overwrite") from error

    def drop(self, kind: str, layer: int) -> None:
        """Removes all batches of a layer."""
        for path in self.folder.glob(f"{kind}-{layer:04}-*"):
            path.unlink()
