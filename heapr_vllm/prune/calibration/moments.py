# SPDX-License-Identifier: Apache-2.0
"""What one calibration pass leaves behind: sums over the tokens routed to each expert, per neuron and per expert.

With h the SwiGLU product that feeds an expert's down_proj, w_k column k of down_proj, and g = dl/dE the gradient of the
summed next-token loss at the expert's output, HEAPr (arXiv 2509.22299, Eq. 15-16) scores neuron k by

    s_k = 1/T sum_x 1/2 (h_k w_k)^T G (h_k w_k),    G = 1/T sum_x g g^T,

over the T tokens x of that expert. Because h_k is a scalar, s_k = 1/2 mean(h_k^2) w_k^T G w_k, and
w_k^T G w_k = mean((w_k . g)^2) = mean((dl/dh_k)^2), since dl/dh_k = w_k . g by the chain rule. Hence

    s_k = 1/2 mean(h_k^2) mean((dl/dh_k)^2)

exactly: one forward and one backward pass, and no hidden x hidden matrix. The router weight multiplies the expert's
output, so it is part of g and of dl/dh_k.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch

from heapr_vllm.errors import HeaprError
from heapr_vllm.formats.schema import Count, Positive, convert
from heapr_vllm.formats.tensorfile import load_tensors, save_tensors

MOMENTS_FILE = "moments.safetensors"
SUMS = ("activation_sq", "gradient_sq", "fisher")
NORMS = ("gate_norm", "up_norm", "down_norm")
OUTPUTS = ("routed_norm", "peak_norm")
MOMENTS_VERSION = 2  # 1 lacks NORMS and OUTPUTS


@dataclass(frozen=True)
class MomentsHeader:
    """What is believed of the metadata of a moments file, if it is there: `CalibrationIdentity` says what it is."""

    model: str = ""
    revision: str | None = None
    base_fingerprint: str | None = None
    num_calibration_samples: Positive | None = None
    max_seq_length: Positive | None = None
    calibration_tokens: Positive | None = None
    loss_tokens: Positive | None = None
    checkpoint_bytes: Count | None = None
    routed_bytes: Count | None = None
    routed_weights: Count | None = None


@dataclass(frozen=True)
class LayerMoments:
    """Sums over calibration tokens for one MoE module of E experts with I neurons each.

    `tokens`: int64 [E], tokens routed to each expert.
    `activation_sq`, `gradient_sq`, `fisher`: float [E, I], sums of h^2, (dl/dh)^2 and (h dl/dh)^2.
    `gate_norm`, `up_norm`, `down_norm`: float [E, I], Euclidean norms of a neuron's gate row, up row and down column.
    `routed_norm`, `peak_norm`: float [E], sum of router weight times ||E(x)|| and the largest ||E(x)||, E(x) being the
    expert's output before its router weight.
    Files of version 1 lack the norms, which are None then; `required` says what to do.
    """

    tokens: torch.Tensor
    activation_sq: torch.Tensor
    gradient_sq: torch.Tensor
    fisher: torch.Tensor
    gate_norm: torch.Tensor | None = None
    up_norm: torch.Tensor | None = None
    down_norm: torch.Tensor | None = None
    routed_norm: torch.Tensor | None = None
    peak_norm: torch.Tensor | None = None

    def saliency(self) -> torch.Tensor:
        """Computes HEAPr's score, float64 [E, I]; zero for experts that saw no token."""
        count = self.tokens.double().clamp(min=1)[:, None]
        return 0.5 * (self.activation_sq.double() / count) * (self.gradient_sq.double() / count)

    def loss_increase(self) -> torch.Tensor:
        """Predicts the rise of the summed calibration loss, in nats, if one neuron is removed; float64 [E, I].

        Removing neuron k changes the loss by 1/2 h_k^2 d^2l/dh_k^2 to second order (the first order vanishes at a
        minimum); with the Fisher information for the curvature, summed over tokens: 1/2 sum (h_k dl/dh_k)^2. Unlike
        the paper's score it is a sum, so it holds how often the expert runs.
        """
        return 0.5 * self.fisher.double()

    def tensors(self) -> dict[str, torch.Tensor]:
        """Lists the tensors that are there, by name."""
        named = {each.name: getattr(self, each.name) for each in fields(self)}
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    def required(self, names: tuple[str, ...], purpose: str) -> list[torch.Tensor]:
        """Returns the tensors `names`. Raises HeaprError if one is missing, as in files of version 1."""
        there = self.tensors()
        if missing := [name for name in names if name not in there]:
            raise HeaprError(
                f"{purpose} needs {', '.join(missing)}, which these moments of an older heapr-vllm lack; "
                "calibrate again"
            )
        return [there[name] for name in names]


def _check_layer(path: Path, prefix: str, layer: dict[str, torch.Tensor]) -> None:
    """Raises HeaprError unless the tensors have the shapes of `LayerMoments` and hold numbers that can be."""
    matrix = tuple(layer["fisher"].shape)
    for name, tensor in layer.items():
        wanted = matrix[:1] if name in ("tokens", *OUTPUTS) else matrix
        is_right = len(matrix) == 2 and tuple(tensor.shape) == wanted
        if not is_right or tensor.is_floating_point() == (name == "tokens"):
            raise HeaprError(
                f"{path} is damaged: {prefix}.{name} is {tensor.dtype} {list(tensor.shape)}; calibrate again"
            )
        if not bool((tensor.isfinite() & (tensor >= 0)).all()):
            raise HeaprError(f"{path} is damaged: {prefix}.{name} holds negative or infinite values; calibrate again")


@dataclass(frozen=True)
class NeuronMoments:
    """The moments of a model.

    `layers`: MoE module prefix as in the checkpoint -> LayerMoments. `metadata`: how they were collected, JSON values
    only.
    """

    layers: dict[str, LayerMoments]
    metadata: dict[str, Any] = field(default_factory=dict)

    def __getitem__(self, prefix: str) -> LayerMoments:
        return self.layers[prefix]

    @property
    def tokens(self) -> dict[str, torch.Tensor]:
        """Tokens routed to each expert, prefix -> int64 [E]."""
        return {prefix: layer.tokens for prefix, layer in self.layers.items()}

    @property
    def calibration_tokens(self) -> int:
        """Tokens of the calibration text. Raises HeaprError if the metadata does not say."""
        if counted := self.metadata.get("calibration_tokens"):
            return counted
        samples, length = (self.metadata.get(name) for name in ("num_calibration_samples", "max_seq_length"))
        if not isinstance(samples, int) or not isinstance(length, int) or min(samples, length) < 1:
            raise HeaprError("the moments' metadata does not say how many tokens the text has; calibrate again")
        return samples * length

    @property
    def loss_tokens(self) -> int:
        """Tokens whose prediction counts; all in files that do not say. Raises HeaprError as `calibration_tokens`."""
        return self.metadata.get("loss_tokens") or self.calibration_tokens

    def save(self, path: Path, dtype: torch.dtype = torch.float32) -> None:
        """Writes all sums and norms in `dtype` and the metadata to `path`, atomically."""
        tensors = {}
        for prefix, layer in self.layers.items():
            for name, values in layer.tensors().items():
                tensors[f"{prefix}.{name}"] = values if name == "tokens" else values.to(dtype)
        save_tensors(path, tensors, self.metadata, MOMENTS_VERSION)

    @classmethod
    def load(cls, path: Path) -> NeuronMoments:
        """Reads a file written by `save`. Raises HeaprError if it is missing, damaged or incomplete."""
        tensors, metadata = load_tensors(path, MOMENTS_VERSION)
        convert(metadata, MomentsHeader, str(path), "calibrate again")
        wanted = {"tokens", *SUMS} if metadata.pop("format_version") == 1 else {"tokens", *SUMS, *NORMS, *OUTPUTS}
        layers: dict[str, dict[str, torch.Tensor]] = {}
        for key in sorted(tensors):
            prefix, _, name = key.rpartition(".")
            layers.setdefault(prefix, {})[name] = tensors[key]
        if not layers or any(layer.keys() != wanted for layer in layers.values()):
            raise HeaprError(f"{path} is not a complete moments file; `heapr calibrate` writes one")
        for prefix, layer in layers.items():
            _check_layer(path, prefix, layer)
        return cls({prefix: LayerMoments(**layer) for prefix, layer in layers.items()}, metadata)

    def save_pretrained(self, directory: str | Path) -> None:
        """Writes `moments.safetensors` into `directory`."""
        self.save(Path(directory) / MOMENTS_FILE)

    @classmethod
    def from_pretrained(cls, directory: str | Path) -> NeuronMoments:
        """Reads `moments.safetensors` from a directory written by `heapr calibrate`."""
        return cls.load(Path(directory) / MOMENTS_FILE)
