# SPDX-License-Identifier: Apache-2.0
"""Collects the moments of every source of a mix on its own, so that they can be weighed afterwards."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager
from typing import Any

import torch
from transformers import PreTrainedModel

from heapr_vllm.errors import HeaprError
from heapr_vllm.prune.calibration.collector import MomentCollector
from heapr_vllm.prune.calibration.moments import ALL, NeuronMoments
from heapr_vllm.prune.text.batches import Batch


class MixCollector:
    """One `MomentCollector` per source, in the order in which batches number them."""

    def __init__(self, model: PreTrainedModel, names: Iterable[str], device: torch.device | None = None) -> None:
        """Raises HeaprError as `MomentCollector`."""
        self.collectors = {name: MomentCollector(model, device) for name in names}

    @classmethod
    def numbered(cls, model: PreTrainedModel, batches: list[Batch], device: torch.device | None = None) -> MixCollector:
        """Makes one for batches whose sources have no names."""
        count = 1 + max(batch.source for batch in batches)
        return cls(model, map(str, range(count)) if count > 1 else (ALL,), device)

    @property
    def first(self) -> MomentCollector:
        return next(iter(self.collectors.values()))

    def attached(self, source: int = 0) -> AbstractContextManager[None]:
        """Adds what runs inside the block to the sums of a source."""
        return list(self.collectors.values())[source].attached()

    def check_reached(self, batches: list[Batch]) -> None:
        """Does `MomentCollector.check_reached` for the sources of these batches."""
        for source in {batch.source for batch in batches}:
            list(self.collectors.values())[source].check_reached()

    def moments(self, metadata: dict[str, Any]) -> NeuronMoments:
        """Copies the sums so far to the CPU."""
        sources = {name: collector.moments({}).layers for name, collector in self.collectors.items()}
        return NeuronMoments.of_sources(sources, metadata)

    def restore(self, moments: NeuronMoments) -> None:
        """Continues from `moments`. Raises HeaprError if they are of other sources, or as `MomentCollector`."""
        if moments.sources.keys() != self.collectors.keys():
            raise HeaprError("the sums so far are of other sources; start anew with --overwrite")
        for name, collector in self.collectors.items():
            collector.restore(NeuronMoments(moments.sources[name]))
