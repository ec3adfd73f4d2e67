# SPDX-License-Identifier: Apache-2.0
"""What a model predicts along a text: log-probabilities of what follows and of some likely tokens, in a folder."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from heapr_vllm.errors import HeaprError
from heapr_vllm.formats.atomic import atomic_file

LARGEST = 700.0  # nats, of which exp is a float


@dataclass(frozen=True, kw_only=True)
class Predictions:
    """Predictions at the T places of one sample that count.

    `following` fp32 [T]: log-probability of the token that follows. `top` int32 [T]: the most likely token. `tokens`
    int32 [T, K]: different tokens at every place, `logprobs` fp32 [T, K]: their log-probabilities.
    """

    following: torch.Tensor
    top: torch.Tensor
    tokens: torch.Tensor
    logprobs: torch.Tensor

    @classmethod
    def of_logits(
        cls, logits: torch.Tensor, following: torch.Tensor, top_k: int, tokens: torch.Tensor | None = None
    ) -> Predictions:
        """Takes the `top_k` most likely tokens, or those of `tokens`, from logits fp32 [T, V]."""
        total = logits.logsumexp(1, keepdim=True)
        if tokens is None:
            values, tokens = logits.topk(min(top_k, logits.shape[1]), dim=1)
        else:
            values = logits.gather(1, tokens.to(logits.device, torch.int64))
        return cls(
            following=(logits.gather(1, following[:, None]) - total)[:, 0].cpu(),
            top=logits.argmax(1).to("cpu", torch.int32),
            tokens=tokens.to("cpu", torch.int32),
            logprobs=(values - total).cpu(),
        )

    @classmethod
    def joined(cls, parts: Sequence[Predictions]) -> Predictions:
        """Puts predictions one after the other."""
        return cls(**{name: torch.cat([vars(part)[name] for part in parts]) for name in vars(parts[0])})

    def at(self, places: torch.Tensor) -> Predictions:
        """Takes those where `places`, bool [T], is true."""
        return Predictions(**{name: tensor[places] for name, tensor in vars(self).items()})

    @staticmethod
    def num_bytes(num_places: int, top_k: int) -> int:
        """How much predictions need on the disk."""
        return num_places * (8 + 8 * top_k)


@dataclass(frozen=True)
class PredictionsFolder:
    """One file a sample, whole or not there: what was interrupted goes on where it stopped."""

    folder: Path

    def missing(self, num_samples: int) -> list[int]:
        return [index for index in range(num_samples) if not self._file(index).is_file()]

    def write(self, index: int, predictions: Predictions) -> None:
        tensors = {name: tensor.contiguous() for name, tensor in asdict(predictions).items()}
        atomic_file(self._file(index), lambda path: save_file(tensors, path))

    def read(self, index: int) -> Predictions:
        """Reads a sample that is not missing. Raises HeaprError if its file is damaged."""
        try:
            return Predictions(**load_file(self._file(index)))
        except (SafetensorError, TypeError) as error:
            raise HeaprError(f"{self._file(index)} is damaged ({error}); remove it and evaluate again") from error

    def read_all(self, num_samples: int) -> Iterator[Predictions]:
        return map(self.read, range(num_samples))

    def perplexity(self, num_samples: int) -> float:
        """Computes exp of the mean negative log-probability of the tokens that follow; NaN if there are no numbers."""
        total, places = 0.0, 0
        for predictions in self.read_all(num_samples):
            total -= predictions.following.double().sum().item()
            places += len(predictions.following)
        mean = total / places
        return math.exp(mean) if mean < LARGEST else math.nan

    def _file(self, index: int) -> Path:
        return self.folder / f"sample-{index:06}.safetensors"
