# SPDX-License-Identifier: Apache-2.0
"""How moments came about: the metadata of moments.safetensors, and calibration.json, which travels with the masks."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from heapr_vllm.errors import HeaprError
from heapr_vllm.formats.atomic import atomic_file
from heapr_vllm.formats.quantized import ExpertScheme
from heapr_vllm.formats.schema import Count, Positive, read_json
from heapr_vllm.formats.served_scheme import CALIBRATION_FILE
from heapr_vllm.prune.calibration.settings import CalibrationSettings
from heapr_vllm.prune.text.samples import SourceRecord


@dataclass(frozen=True)
class CheckpointSizes:
    """Bytes of all weights of a compact checkpoint that removes nothing, and of those that can be pruned."""

    whole: int
    routed: int
    routed_weights: int | None

    @classmethod
    def from_metadata(cls, metadata: dict[str, Any]) -> CheckpointSizes | None:
        """Reads what calibration recorded of its base model; None if an old version did not."""
        whole, routed = metadata.get("checkpoint_bytes"), metadata.get("routed_bytes")
        return None if whole is None or routed is None else cls(whole, routed, metadata.get("routed_weights"))

    def stored_as(self, scheme: ExpertScheme | None) -> CheckpointSizes | None:
        """Returns the sizes with experts as `scheme` says; None if an old version did not count their weights."""
        if scheme is None:
            return self
        if self.routed_weights is None:
            return None
        routed = int(self.routed_weights * scheme.bits_per_weight() / 8)
        return replace(self, whole=self.whole - self.routed + routed, routed=routed)


@dataclass(frozen=True, kw_only=True)
class CalibrationIdentity(CalibrationSettings):
    """The settings and what they meant at the time: all that the moments depend on.

    `revision` is the commit of a Hub snapshot. `checkpoint_bytes`, `routed_bytes`: sizes of all weights and of those
    that can be pruned, as `heapr export` writes them unless told otherwise; `routed_weights`: number of the latter.
    None in files of old versions.
    """

    processes: Positive = 1
    dataset_fingerprint: str = ""
    base_fingerprint: str = ""
    checkpoint_bytes: Count | None = None
    routed_bytes: Count | None = None
    routed_weights: Count | None = None

    @property
    def sizes(self) -> CheckpointSizes | None:
        return CheckpointSizes.from_metadata(asdict(self))


@dataclass(frozen=True, kw_only=True)
class CalibrationRecord(CalibrationIdentity):
    """The content of calibration.json.

    `calibration_tokens`: of the text; `loss_tokens`: of them, those whose prediction counts; `sources`: where they are
    from. `mix`: shares of sources by which masks were chosen and `tokens` weighed, if not as they were collected.
    `tokens`: MoE module prefix -> calibration tokens that each expert got. `versions`: package -> version.
    """

    calibration_tokens: Count = 0
    loss_tokens: Count = 0
    sources: list[SourceRecord] = field(default_factory=list)
    mix: dict[str, float] | None = None
    wall_time_seconds: float = 0.0
    versions: dict[str, str] = field(default_factory=dict)
    tokens: dict[str, list[Count]]

    @property
    def dataset_name(self) -> str:
        """All specs in one line."""
        return self.dataset if isinstance(self.dataset, str) else ", ".join(self.dataset)

    @property
    def settings(self) -> CalibrationSettings:
        """The settings alone, to draw the same text again."""
        return CalibrationSettings(**{each.name: getattr(self, each.name) for each in fields(CalibrationSettings)})

    @classmethod
    def read(cls, folder: Path, remedy: str) -> CalibrationRecord:
        """Reads calibration.json in `folder`; unknown keys are ignored, so that later versions may add some.

        Raises HeaprError with the `remedy` if it is missing, incomplete or damaged.
        """
        path = folder / CALIBRATION_FILE
        if not path.is_file():
            raise HeaprError(f"{path} is missing; {remedy}")
        return read_json(path, cls, remedy)

    def write(self, folder: Path) -> None:
        """Writes calibration.json into `folder`, atomically."""
        text = json.dumps(asdict(self), indent=2) + "\n"
        atomic_file(folder / CALIBRATION_FILE, lambda path: path.write_text(text))
