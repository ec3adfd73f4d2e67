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

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from heapr_vllm.errors import HeaprError
from heapr_vllm.formats.tensorfile import load_tensors, save_tensors

MOMENTS_FILE = "moments.safetensors"
CALIBRATION_FILE = "calibration.json"
SUMS = ("activation_sq", "gradient_sq", "fisher")
NORMS = ("gate_norm", "up_norm", "down_norm")
OUTPUTS = ("routed_norm", "peak_norm")
MOMENTS_VERSION = 2  # 1 lacks NORMS and OUTPUTS


@dataclass(frozen=True)
class NeuronMoments:
    """Sums over calibration tokens, by MoE module prefix as in the checkpoint.

    `tokens`: int64 [E] tokens routed to each expert. `activation_sq`: sum of h^2, `gradient_sq`: sum of (dl/dh)^2,
    `fisher`: sum of (h dl/dh)^2, each float [E, I]. `gate_norm`, `up_norm`, `down_norm`: Euclidean norms of a neuron's
    gate row, up row and down column, float [E, I]. `routed_norm`: sum of router weight times ||E(x)||, `peak_norm`: the
    largest ||E(x)||, float [E] each, E(x) being the expert's output before its router weight. Files of version 1 lack
    the norms; they load, and `require` says what to do. `metadata`: how the moments were collected, JSON values only.
    """

    tokens: dict[str, torch.Tensor]
    activation_sq: dict[str, torch.Tensor]
    gradient_sq: dict[str, torch.Tensor]
    fisher: dict[str, torch.Tensor]
    gate_norm: dict[str, torch.Tensor] = field(default_factory=dict)
    up_norm: dict[str, torch.Tensor] = field(default_factory=dict)
    down_norm: dict[str, torch.Tensor] = field(default_factory=dict)
    routed_norm: dict[str, torch.Tensor] = field(default_factory=dict)
    peak_norm: dict[str, torch.Tensor] = field(default_factory=dict)
    metadata: dict[str, Any] = field(default_factory=dict)

    def saliency(self) -> dict[str, torch.Tensor]:
        """HEAPr's score, prefix to float64 [E, I]; zero for experts that saw no token."""
        scores = {}
        for prefix, tokens in self.tokens.items():
            count = tokens.double().clamp(min=1)[:, None]
            activation, gradient = self.activation_sq[prefix].double(), self.gradient_sq[prefix].double()
            scores[prefix] = 0.5 * (activation / count) * (gradient / count)
        return scores

    def loss_increase(self) -> dict[str, torch.Tensor]:
        """Predicted rise of the summed calibration loss, in nats, if one neuron is removed; prefix to float64 [E, I].

        Removing neuron k changes the loss by 1/2 h_k^2 d^2l/dh_k^2 to second order (the first order vanishes at a
        minimum); with the Fisher information for the curvature, summed over tokens: 1/2 sum (h_k dl/dh_k)^2. Unlike
        the paper's score it is a sum, so it holds how often the expert runs.
        """
        return {prefix: 0.5 * sums.double() for prefix, sums in self.fisher.items()}

    @property
    def calibration_tokens(self) -> int:
        """Tokens of the calibration text. Raises HeaprError if the metadata does not say."""
        try:
            return self.metadata["num_calibration_samples"] * self.metadata["max_seq_length"]
        except KeyError as error:
            raise HeaprError(f"the moments' metadata lacks {error}; calibrate again") from error

    def require(self, names: tuple[str, ...], purpose: str) -> None:
        """Raises HeaprError if one of the tensors `names` is missing, as in files of version 1."""
        if missing := [name for name in names if getattr(self, name).keys() != self.tokens.keys()]:
            raise HeaprError(
                f"{purpose} needs {', '.join(missing)}, which these moments of an older heapr-vllm lack; "
                "calibrate again"
            )

    def save(self, path: Path, dtype: torch.dtype = torch.float32) -> None:
        """Writes all sums and norms in `dtype` and the metadata to `path`, atomically."""
        tensors = {f"{prefix}.tokens": count for prefix, count in self.tokens.items()}
        for name in (*SUMS, *NORMS, *OUTPUTS):
            tensors |= {f"{prefix}.{name}": values.to(dtype) for prefix, values in getattr(self, name).items()}
        save_tensors(path, tensors, self.metadata, MOMENTS_VERSION)

    @classmethod
    def load(cls, path: Path) -> NeuronMoments:
        """Reads a file written by `save`. Raises HeaprError if it is missing, damaged or incomplete."""
        tensors, metadata = load_tensors(path, MOMENTS_VERSION)
        wanted = {"tokens", *SUMS} if metadata.pop("format_version") == 1 else {"tokens", *SUMS, *NORMS, *OUTPUTS}
        groups: dict[str, dict[str, torch.Tensor]] = {name: {} for name in wanted}
        for key in sorted(tensors):
            prefix, _, name = key.rpartition(".")
            groups.setdefault(name, {})[prefix] = tensors[key]
        if groups.keys() != wanted or len({frozenset(group) for group in groups.values()}) != 1:
            raise HeaprError(f"{path} is not a complete moments file; `heapr calibrate` writes one")
        return cls(**groups, metadata=metadata)

    def save_pretrained(self, directory: str | Path) -> None:
        """Writes `moments.safetensors` into `directory`."""
        self.save(Path(directory) / MOMENTS_FILE)

    @classmethod
    def from_pretrained(cls, directory: str | Path) -> NeuronMoments:
        """Reads `moments.safetensors` from a directory written by `heapr calibrate`."""
        return cls.load(Path(directory) / MOMENTS_FILE)
