# SPDX-License-Identifier: Apache-2.0
"""What an engine that serves the unpruned model saw of its traffic: per layer, tokens and activation energy.

A folder holds a file for every rank of every run of the engine; together they are one `Traffic`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from heapr_vllm.errors import HeaprError
from heapr_vllm.formats.schema import Positive, convert
from heapr_vllm.formats.tensorfile import load_tensors, save_tensors

NAMES = ("activation_sq", "tokens")


@dataclass(frozen=True)
class TrafficHeader:
    """Metadata of a file.

    `run`: the engine's, the same on all its `ranks`. `top_k`: experts of a token. `base_fingerprint`: of the served
    model.
    """

    run: str
    rank: int
    ranks: Positive = 1
    top_k: Positive = 1
    model: str = ""
    base_fingerprint: str | None = None


@dataclass(frozen=True)
class LayerTraffic:
    """Sums over the served tokens for one MoE module of E experts with I neurons each.

    `activation_sq`: float32 [E, I], sum of h^2, h being the SwiGLU product that feeds down_proj. `tokens`: int64 [E].
    """

    activation_sq: torch.Tensor
    tokens: torch.Tensor


@dataclass(frozen=True)
class Traffic:
    """The layers by prefix as in the checkpoint, and where they come from."""

    layers: dict[str, LayerTraffic]
    runs: int
    base_fingerprint: str | None
    top_k: int = 1

    @property
    def tokens(self) -> int:
        """Tokens that were served, counted in the layer where they chose most experts."""
        return max(int(layer.tokens.sum()) for layer in self.layers.values()) // self.top_k

    @classmethod
    def load(cls, folder: Path) -> Traffic:
        """Adds up a folder. Raises HeaprError if it holds no traffic, damaged files, or traffic of several models."""
        paths = sorted(folder.glob("*.safetensors")) if folder.is_dir() else []
        if not paths:
            raise HeaprError(
                f"{folder} holds no traffic; serve the model with HEAPR_TRAFFIC={folder} and ask it something"
            )
        runs: dict[str, dict[str, LayerTraffic]] = {}
        missing: dict[str, int] = {}
        models = set()
        for path in paths:
            header, layers = _read(path)
            models.add((header.base_fingerprint, header.top_k))
            missing[header.run] = missing.get(header.run, header.ranks) - 1
            runs[header.run] = _joined(path, runs.get(header.run, {}), layers)
        if len(models) > 1:
            raise HeaprError(f"{folder} holds traffic of different models; keep one model's files in it")
        for run, ranks in missing.items():
            if ranks:
                raise HeaprError(f"{folder} lacks files of run {run}; bring those of all ranks, or remove the others")
        fingerprint, top_k = models.pop()
        first, *others = runs.values()
        for run in others:
            first = _added(folder, first, run)
        return cls(first, len(runs), fingerprint, top_k)


def save_traffic(path: Path, layers: dict[str, LayerTraffic], header: dict[str, Any]) -> None:
    """Writes a rank's sums, with the neurons and experts of other ranks zero; `header` as `TrafficHeader`."""
    tensors = {}
    for prefix, layer in layers.items():
        for name in NAMES:
            tensors[f"{prefix}.{name}"] = getattr(layer, name)
    save_tensors(path, tensors, header)


def _read(path: Path) -> tuple[TrafficHeader, dict[str, LayerTraffic]]:
    tensors, metadata = load_tensors(path)
    header = convert(metadata, TrafficHeader, str(path), "remove it")
    found: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        prefix, _, name = key.rpartition(".")
        found.setdefault(prefix, {})[name] = tensor
    layers = {}
    for prefix, named in found.items():
        if set(named) != set(NAMES):
            raise HeaprError(f"{path} is no record of traffic; remove it from the folder")
        energy, tokens = named["activation_sq"], named["tokens"]
        is_right = energy.ndim == 2 and energy.dtype == torch.float32 and tokens.dtype == torch.int64
        if not is_right or tokens.shape != energy.shape[:1] or not bool((energy >= 0).all() and (tokens >= 0).all()):
            raise HeaprError(f"{path} is damaged: {prefix} holds no sums; remove it")
        layers[prefix] = LayerTraffic(energy, tokens)
    return header, layers


def _joined(path: Path, run: dict[str, LayerTraffic], rank: dict[str, LayerTraffic]) -> dict[str, LayerTraffic]:
    """Adds a rank: neurons lie on one rank each; tokens are counted on every rank that holds some of the expert's."""
    joined = dict(run)
    for prefix, layer in rank.items():
        if other := run.get(prefix):
            energy = _same(path, prefix, other, layer).activation_sq + layer.activation_sq
            layer = LayerTraffic(energy, other.tokens.maximum(layer.tokens))
        joined[prefix] = layer
    return joined


def _added(folder: Path, total: dict[str, LayerTraffic], run: dict[str, LayerTraffic]) -> dict[str, LayerTraffic]:
    if total.keys() != run.keys():
        raise HeaprError(f"{folder} lacks files of some ranks; remove the other files of that run")
    added = {}
    for prefix, layer in run.items():
        other = _same(folder, prefix, total[prefix], layer)
        added[prefix] = LayerTraffic(other.activation_sq + layer.activation_sq, other.tokens + layer.tokens)
    return added


def _same(path: Path, prefix: str, first: LayerTraffic, second: LayerTraffic) -> LayerTraffic:
    if first.activation_sq.shape != second.activation_sq.shape:
        raise HeaprError(f"{path} is of another model: {prefix} has another shape; keep one model's files together")
    return first
