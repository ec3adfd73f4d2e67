# SPDX-License-Identifier: Apache-2.0
"""Retained-neuron masks: which intermediate neurons every routed expert keeps.

A neuron (the paper's "atomic expert") is row k of an expert's gate_proj and up_proj and column k of its down_proj.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from heapr_vllm.errors import HeaprError
from heapr_vllm.formats.config import MASKS_FILE, BaseModel
from heapr_vllm.formats.hub import download
from heapr_vllm.formats.names import ExpertTensor
from heapr_vllm.formats.schema import Count, Positive, convert
from heapr_vllm.formats.tensorfile import load_tensors, save_tensors

CREATE_AGAIN = "create or download it again"


@dataclass(frozen=True)
class WorstCaseHeader:
    """How masks were chosen for the source that loses most.

    `weights`: of the sources, by name; `largest`: predicted loss in nats per token; `bound`: no choice gets below.
    """

    weights: dict[str, float]
    largest: float
    bound: float


@dataclass(frozen=True)
class MasksHeader:
    """What is believed of the metadata of a masks file.

    `kept`: neurons that stay. `num_neurons`: MoE module prefix -> moe_intermediate_size. The rest says how the masks
    were made; `tokens`: prefix -> how many calibration tokens each expert got.
    """

    kept: Count
    num_neurons: dict[str, Positive]
    tokens: dict[str, list[Count]] = field(default_factory=dict)
    base_model: BaseModel | None = None
    criterion: str | None = None
    scope: str | None = None
    align: Positive | None = None
    sparsity: float | None = None
    protected: list[str] | None = None
    prices: dict[str, float] | None = None
    mix: dict[str, float] | None = None
    worst_case: WorstCaseHeader | None = None


def pack_bits(keep: torch.Tensor) -> torch.Tensor:
    """Packs bool [E, I] into uint8 [E, ceil(I/8)]; bit k of byte j is neuron 8j+k, padding bits are zero."""
    return torch.from_numpy(np.packbits(keep.numpy(), axis=-1, bitorder="little"))


def unpack_bits(packed: torch.Tensor, num_neurons: int) -> torch.Tensor:
    """Inverts `pack_bits`: uint8 [E, ceil(I/8)] to bool [E, I]."""
    bits = np.unpackbits(packed.numpy(), axis=-1, count=num_neurons, bitorder="little")
    return torch.from_numpy(bits.astype(bool))


def _unpacked(path: Path, prefix: str, packed: torch.Tensor, num_neurons: int) -> torch.Tensor:
    """Does `unpack_bits` with a tensor of the file `path`. Raises HeaprError if it is no such tensor."""
    is_mask = packed.dtype == torch.uint8 and packed.dim() == 2 and packed.shape[1] == -(-num_neurons // 8)
    if not is_mask:
        raise HeaprError(
            f"{path} is damaged: {prefix} is {packed.dtype} {list(packed.shape)}, masks of {num_neurons} neurons are "
            f"torch.uint8 [experts, {-(-num_neurons // 8)}]; {CREATE_AGAIN}"
        )
    keep = unpack_bits(packed, num_neurons)
    if not torch.equal(pack_bits(keep), packed):
        raise HeaprError(f"{path} is damaged: {prefix} has bits beyond its {num_neurons} neurons; {CREATE_AGAIN}")
    return keep


def file_sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def check_masks_sha256(path: Path, expected: str | None) -> None:
    """Raises HeaprError if the masks file is not the one config.json was written for; None expects nothing."""
    if expected not in (None, file_sha256(path)):
        raise HeaprError(
            f"{path} is damaged or changed: it differs from the masks_sha256 in config.json; create or "
            "download it again"
        )


@dataclass(frozen=True)
class NeuronMasks:
    """Masks of one model.

    `keep`: MoE module prefix as in the checkpoint (`model.layers.3.mlp.experts`) -> bool [num_experts,
    moe_intermediate_size], true where the neuron stays. `metadata`: how they were made, JSON values only; under
    "tokens", if there, prefix -> how many calibration tokens each expert got.
    """

    keep: dict[str, torch.Tensor]
    metadata: dict[str, Any] = field(default_factory=dict)

    @property
    def widths(self) -> dict[str, torch.Tensor]:
        """Kept neurons per expert, prefix -> int64 [num_experts]."""
        return {prefix: mask.sum(-1) for prefix, mask in self.keep.items()}

    @property
    def num_neurons(self) -> int:
        return sum(mask.numel() for mask in self.keep.values())

    @property
    def num_kept(self) -> int:
        return sum(int(mask.sum()) for mask in self.keep.values())

    @property
    def sparsity(self) -> float:
        """Fraction of routed neurons removed."""
        return 1 - self.num_kept / self.num_neurons

    def tokens(self, prefix: str) -> list[int] | None:
        """Looks up the calibration tokens that each expert of a module got; None if the masks do not say."""
        return self.metadata.get("tokens", {}).get(prefix)

    def executed_reduction(self, tokens: dict[str, torch.Tensor]) -> float:
        """Computes the fraction of executed routed-expert FLOPs removed.

        `tokens`: prefix -> int64 [num_experts], tokens routed to each expert; a token costs its expert's width. Raises
        HeaprError if there are none.
        """
        full = sum(float(count.sum()) * self.keep[prefix].shape[1] for prefix, count in tokens.items())
        if not full:
            raise HeaprError(
                "no expert got a calibration token, so nothing is known of executed FLOPs; calibrate again"
            )
        kept = sum(float((count * self.widths[prefix]).sum()) for prefix, count in tokens.items())
        return 1 - kept / full

    def expanded(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """Gives a tensor of a compact checkpoint its full size: kept rows or columns at their places, zeros elsewhere.

        Tensors that are not a pruned expert's weight pass as they are. Raises HeaprError if an expert has another width
        than its mask keeps.
        """
        where = ExpertTensor.parse(name)
        if where is None or where.prefix not in self.keep:
            return tensor
        experts = self.keep[where.prefix]
        if where.expert is None or where.expert >= len(experts):
            raise HeaprError(f"{name} is no tensor of a compact checkpoint of these masks; {CREATE_AGAIN}")
        keep = experts[where.expert]
        axis = 1 if where.shard == "w2" else 0
        if tensor.shape[axis] != int(keep.sum()):
            raise HeaprError(
                f"{name} is {list(tensor.shape)}, its mask keeps {int(keep.sum())} neurons; {CREATE_AGAIN}"
            )
        shape = [len(keep) if dim == axis else size for dim, size in enumerate(tensor.shape)]
        return tensor.new_zeros(shape).index_copy_(axis, keep.nonzero().flatten(), tensor)

    def save(self, path: Path) -> None:
        """Writes the masks file; equal masks give equal bytes."""
        metadata = {
            **self.metadata,
            "kept": self.num_kept,
            "num_neurons": {prefix: mask.shape[1] for prefix, mask in self.keep.items()},
        }
        save_tensors(path, {prefix: pack_bits(mask) for prefix, mask in self.keep.items()}, metadata)

    @classmethod
    def load(cls, path: Path) -> NeuronMasks:
        """Reads a masks file. Raises HeaprError if it is missing, damaged or inconsistent."""
        packed, metadata = load_tensors(path)
        header = convert(metadata, MasksHeader, str(path), CREATE_AGAIN)
        for name in ("num_neurons", "kept", "format_version"):
            metadata.pop(name, None)
        if not packed or header.num_neurons.keys() != packed.keys():
            raise HeaprError(f"{path} is not a masks file; `heapr prune` writes one")
        keep = {
            prefix: _unpacked(path, prefix, packed[prefix], header.num_neurons[prefix]) for prefix in sorted(packed)
        }
        masks = cls(keep, metadata)
        if masks.num_kept != header.kept:
            raise HeaprError(
                f"{path} is damaged: it keeps {masks.num_kept} neurons, its header says {header.kept}; {CREATE_AGAIN}"
            )
        for prefix, tokens in header.tokens.items():
            if len(tokens) != len(masks.keep.get(prefix, ())):
                raise HeaprError(
                    f"{path} is damaged: it counts the tokens of {len(tokens)} experts of {prefix}; {CREATE_AGAIN}"
                )
        return masks

    def save_pretrained(self, directory: str | Path) -> None:
        """Writes `heapr/masks.safetensors` into `directory`."""
        self.save(Path(directory) / MASKS_FILE)

    @classmethod
    def from_pretrained(cls, name_or_path: str | Path, revision: str | None = None) -> NeuronMasks:
        """Reads masks from a file, a directory that holds `heapr/masks.safetensors`, or a Hub repository."""
        return cls.load(find_masks(str(name_or_path), revision))

    def check_fits(self, expert_shapes: dict[str, tuple[int, int]], model: str) -> None:
        """Raises HeaprError unless the masks cover exactly these MoE modules.

        `expert_shapes`: prefix -> (num_experts, moe_intermediate_size) of `model`.
        """
        for words, names in (
            ("the masks lack", expert_shapes.keys() - self.keep.keys()),
            ("the model lacks", self.keep.keys() - expert_shapes.keys()),
        ):
            if names:
                raise HeaprError(
                    f"masks do not belong to {model}: {words} {len(names)} MoE module(s), first "
                    f"{min(names)}; use the model they were made for"
                )
        for prefix, shape in expert_shapes.items():
            if tuple(self.keep[prefix].shape) != tuple(shape):
                raise HeaprError(
                    f"masks do not belong to {model}: {prefix} has (experts, neurons) {tuple(shape)}, the "
                    f"masks have {tuple(self.keep[prefix].shape)}; use the model they were made for"
                )


def find_masks(name_or_path: str, revision: str | None = None, name: str = MASKS_FILE) -> Path:
    """Finds the masks file in a file, directory or Hub repository, where it is called `name`.

    Raises HeaprError if there is none.
    """
    path = Path(name_or_path)
    if path.is_file():
        return path
    if path.is_dir():
        if not (path / name).is_file():
            raise HeaprError(f"{path} holds no {name}; create it with `heapr prune`")
        return path / name
    return download(name_or_path, name, revision)
