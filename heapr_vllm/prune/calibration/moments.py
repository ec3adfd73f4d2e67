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

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch

from heapr_vllm.errors import HeaprError
from heapr_vllm.formats.schema import Count, Positive, convert
from heapr_vllm.formats.tensorfile import load_tensors, save_tensors
from heapr_vllm.prune.text.samples import SourceRecord
from heapr_vllm.prune.text.sources import check_shares

MOMENTS_FILE = "moments.safetensors"
SUMS = ("activation_sq", "gradient_sq", "fisher")
NORMS = ("gate_norm", "up_norm", "down_norm")
OUTPUTS = ("routed_norm", "peak_norm")
MAXIMA = ("peak_norm", *NORMS)  # the others add up; norms of weights are the same in every part
MOMENTS_VERSION = 3  # of mixes
PLAIN_VERSION = 2  # of one source; 1 lacks NORMS and OUTPUTS
ALL = "all"  # what the one source is called


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
    sources: list[SourceRecord] = field(default_factory=list)
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


def _weighed(layers: Sequence[LayerMoments], factors: Sequence[float]) -> LayerMoments:
    """Adds up the moments of one MoE module over sources, each times its factor.

    Tokens are rounded, but not to none where there are some; those of sources with a factor of 0 do not count.
    """
    parts = [(layer.tensors(), factor) for layer, factor in zip(layers, factors, strict=True) if factor > 0]
    counts = torch.stack([tensors.pop("tokens") for tensors, _ in parts])
    weights = torch.tensor([factor for _, factor in parts], dtype=torch.float64)
    tokens = (counts * weights[:, None]).sum(0).round().long().clamp(min=counts.any(0).long())
    mixed: dict[str, torch.Tensor] = {}
    for name in parts[0][0]:
        values = [(tensors[name], factor) for tensors, factor in parts]
        stacked = torch.stack([value if name in MAXIMA else value * factor for value, factor in values])
        mixed[name] = stacked.amax(0) if name in MAXIMA else stacked.sum(0)
    return LayerMoments(tokens, **mixed)


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


def _checked(path: Path, layers: dict[str, dict[str, torch.Tensor]]) -> dict[str, LayerMoments]:
    """Raises HeaprError as `_check_layer`."""
    for prefix, layer in layers.items():
        _check_layer(path, prefix, layer)
    return {prefix: LayerMoments(**layer) for prefix, layer in layers.items()}


def _layers(tensors: dict[str, torch.Tensor], source: str) -> dict[str, dict[str, torch.Tensor]]:
    """Sorts tensors by MoE module and name: those whose keys begin with `source`, and norms, which have none."""
    layers: dict[str, dict[str, torch.Tensor]] = {}
    for key in sorted(tensors):
        prefix, _, name = key.removeprefix(source).rpartition(".")
        if "/" not in prefix and (key.startswith(source) or name in NORMS):
            layers.setdefault(prefix, {})[name] = tensors[key]
    return layers


@dataclass(frozen=True)
class NeuronMoments:
    """The moments of a model.

    `layers`: MoE module prefix as in the checkpoint -> LayerMoments, of the whole text. `metadata`: how they were
    collected, JSON values only. `sources`: name -> the same of each of its sources; one called ALL if there is no mix.
    """

    layers: dict[str, LayerMoments]
    metadata: dict[str, Any] = field(default_factory=dict)
    sources: dict[str, dict[str, LayerMoments]] = field(default_factory=dict)

    @classmethod
    def of_sources(cls, sources: dict[str, dict[str, LayerMoments]], metadata: dict[str, Any]) -> NeuronMoments:
        """Adds up the sources."""
        first, *others = sources.values()
        layers = first
        if others:
            ones = [1.0] * len(sources)
            layers = {prefix: _weighed([each[prefix] for each in sources.values()], ones) for prefix in first}
        return cls(layers, metadata, sources)

    def mixed(self, shares: dict[str, float]) -> NeuronMoments:
        """Makes the moments of another mix, by each source's share of the tokens.

        With T_s tokens of source s and T of all, its sums count T share_s / T_s times: then T tokens have that mix, and
        the shares T_s / T change nothing. Sources that are not named get no share. Raises HeaprError if shares do not
        add up to 1 or a source is unknown.
        """
        check_shares(shares)
        if unknown := sorted(shares.keys() - self.sources.keys()):
            raise HeaprError(
                f"the moments have no source {unknown[0]}, only {', '.join(self.sources)}; choose among them, or "
                "calibrate on several with --dataset NAME=SPEC"
            )
        if len(self.sources) == 1:
            return self
        records = {record["name"]: record for record in self.metadata["sources"]}
        total = self.calibration_tokens
        factors = [shares.get(name, 0.0) * total / records[name]["tokens"] for name in self.sources]
        predictions = [records[name]["predictions"] for name in self.sources]
        loss_tokens = round(sum(factor * count for factor, count in zip(factors, predictions, strict=True)))
        layers = {
            prefix: _weighed([layers[prefix] for layers in self.sources.values()], factors) for prefix in self.layers
        }
        return NeuronMoments(layers, self.metadata | {"loss_tokens": loss_tokens, "mix": shares}, self.sources)

    def source_predictions(self) -> dict[str, int]:
        """Counts the tokens of every source whose prediction counts, by name; empty if there is no mix."""
        if len(self.sources) < 2:
            return {}
        return {record["name"]: record["predictions"] for record in self.metadata["sources"]}

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
        """Writes all sums and norms in `dtype` and the metadata to `path`, atomically.

        Norms of weights are there once; of a mix, the rest is there per source, as `source/prefix.name`, and the file
        has version 3.
        """
        tensors = {}
        is_mix = len(self.sources) > 1
        for source, layers in (self.sources if is_mix else {ALL: self.layers}).items():
            for prefix, layer in layers.items():
                for name, values in layer.tensors().items():
                    key = f"{source}/{prefix}.{name}" if is_mix and name not in NORMS else f"{prefix}.{name}"
                    values = values if name == "tokens" else values.to(dtype)
                    tensors[key] = tensors[key].maximum(values) if key in tensors else values
        save_tensors(path, tensors, self.metadata, MOMENTS_VERSION if is_mix else PLAIN_VERSION)

    @classmethod
    def load(cls, path: Path) -> NeuronMoments:
        """Reads a file written by `save`. Raises HeaprError if it is missing, damaged or incomplete."""
        tensors, metadata = load_tensors(path, MOMENTS_VERSION)
        header = convert(metadata, MomentsHeader, str(path), "calibrate again")
        version = metadata.pop("format_version")
        is_mix = version > PLAIN_VERSION
        wanted = {"tokens", *SUMS} if version == 1 else {"tokens", *SUMS, *NORMS, *OUTPUTS}
        names = [source.name for source in header.sources] if is_mix else [ALL]
        sources = {name: _layers(tensors, f"{name}/" if is_mix else "") for name in names}
        prefixes = {frozenset(layers) for layers in sources.values()}
        complete = all(layer.keys() == wanted for layers in sources.values() for layer in layers.values())
        if len(prefixes) != 1 or not all(prefixes) or not complete:
            raise HeaprError(f"{path} is not a complete moments file; `heapr calibrate` writes one")
        checked = {name: _checked(path, layers) for name, layers in sources.items()}
        return cls.of_sources(checked, metadata)

    def save_pretrained(self, directory: str | Path) -> None:
        """Writes `moments.safetensors` into `directory`."""
        self.save(Path(directory) / MOMENTS_FILE)

    @classmethod
    def from_pretrained(cls, directory: str | Path) -> NeuronMoments:
        """Reads `moments.safetensors` from a directory written by `heapr calibrate`."""
        return cls.load(Path(directory) / MOMENTS_FILE)
