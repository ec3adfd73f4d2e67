# SPDX-License-Identifier: Apache-2.0
"""What a killed calibration leaves in its output folder, and how a resumed one finds it."""

from __future__ import annotations

import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from heapr_vllm.errors import HeaprError
from heapr_vllm.formats.atomic import remove_leftovers
from heapr_vllm.formats.schema import convert
from heapr_vllm.prune.calibration.mix_collector import MixCollector
from heapr_vllm.prune.calibration.moments import ALL, MOMENTS_FILE, NeuronMoments
from heapr_vllm.prune.calibration.processes import Processes
from heapr_vllm.prune.calibration.record import CALIBRATION_FILE, CalibrationIdentity

PARTIAL_FILE = "partial.safetensors"
STREAM_FOLDER = "stream"


@dataclass(frozen=True)
class SavedState:
    """The sums so far of this process, in `output`.

    `identity`: all that the result depends on; a resumed run must have the same. `sources`: of the text, as JSON.
    """

    output: Path
    identity: CalibrationIdentity
    processes: Processes
    sources: list[dict[str, Any]]

    @property
    def names(self) -> list[str]:
        """Names of what is collected apart: the sources of a mix."""
        return [source["name"] for source in self.sources] if len(self.sources) > 1 else [ALL]

    @property
    def partial(self) -> Path:
        return self._partial_of(self.processes.rank)

    def _partial_of(self, rank: int) -> Path:
        return self.output / (f"partial-{rank}.safetensors" if rank else PARTIAL_FILE)

    @property
    def stream_folder(self) -> Path:
        """Where this process keeps hidden states."""
        return self.output / STREAM_FOLDER / str(self.processes.rank)

    def save(self, collector: MixCollector, position: dict[str, int]) -> None:
        """Writes the sums, which are complete up to `position`."""
        metadata = {**asdict(self.identity), "sources": self.sources, **position}
        collector.moments(metadata).save(self.partial, torch.float64)

    def load(self) -> NeuronMoments | None:
        """Reads what `save` wrote last, with the position in its metadata; None if there is nothing."""
        return self._load(self.partial)

    def finished(self) -> NeuronMoments | None:
        """Reads the result, if the run had ended: its record is written last, then its sums are removed."""
        is_whole = (self.output / CALIBRATION_FILE).is_file() and not (self.output / PARTIAL_FILE).is_file()
        return self._load(self.output / MOMENTS_FILE) if is_whole else None

    def remove(self) -> None:
        """Removes the state of all processes."""
        shutil.rmtree(self.output / STREAM_FOLDER, ignore_errors=True)
        for path in self.output.glob("partial-*.safetensors"):
            path.unlink()
        (self.output / PARTIAL_FILE).unlink(missing_ok=True)
        if self.output.is_dir():
            for rank in range(self.processes.size):
                remove_leftovers(self._partial_of(rank))

    def _load(self, path: Path) -> NeuronMoments | None:
        """Raises HeaprError if the sums belong to other settings."""
        if not path.is_file():
            return None
        saved = NeuronMoments.load(path)
        theirs = asdict(convert(saved.metadata, CalibrationIdentity, str(path), "start anew with --overwrite"))
        changed = sorted(key for key, value in asdict(self.identity).items() if theirs[key] != value)
        if changed:
            raise HeaprError(
                f"{self.output} was started with another {', '.join(changed)}; repeat the original "
                "command with --resume, or start anew with --overwrite"
            )
        return saved
