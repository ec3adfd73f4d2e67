# SPDX-License-Identifier: Apache-2.0
"""The summary of masks, from records of this version and of older ones."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from heapr_vllm.errors import HeaprError
from heapr_vllm.formats.masks import NeuronMasks
from heapr_vllm.prune.calibration.record import CALIBRATION_FILE, CalibrationRecord
from heapr_vllm.prune.report.summary import speed_note, summarize

PREFIX = "model.layers.0.mlp.experts"


def record(**changes: object) -> CalibrationRecord:
    return CalibrationRecord(**{"model": "m", "dataset": "d", "tokens": {PREFIX: [30, 10, 0]}} | changes)


def masks() -> NeuronMasks:
    """Three experts of 4 neurons that keep 4, 2 and 0."""
    return NeuronMasks({PREFIX: torch.arange(4).expand(3, 4) < torch.tensor([4, 2, 0])[:, None]})


def test_numbers_of_a_small_case() -> None:
    summary = summarize(masks(), record(checkpoint_bytes=1000, routed_bytes=600))
    assert summary.kept == 6 and summary.stored_reduction == 0.5
    assert summary.executed_reduction == pytest.approx(1 - (30 * 4 + 10 * 2) / (40 * 4))
    assert summary.compact_bytes == 700 and summary.checkpoint_bytes == 1000
    assert summary.dead_experts == summary.unrouted_experts == [f"{PREFIX}.2"]
    assert list(summary.to_dict()) == [
        "base_model",
        "neurons",
        "kept",
        "stored_reduction",
        "executed_reduction",
        "compact_bytes",
        "checkpoint_bytes",
        "full_width",
        "dead_experts",
        "unrouted_experts",
        "widths",
        "metadata",
    ]


def test_records_of_older_versions_lack_the_sizes() -> None:
    old = summarize(masks(), record())
    assert old.compact_bytes is None and not {"compact_bytes", "checkpoint_bytes", "repair"} & old.to_dict().keys()


def test_a_note_below_half_of_the_stored_reduction() -> None:
    summary = summarize(masks(), record())
    assert "speed follows executed FLOPs, which fall by 12.5% only" in speed_note(summary)
    assert speed_note(replace(summary, executed_reduction=0.25)) is None


def test_the_record_on_disk(calibration: Path, tmp_path: Path) -> None:
    content = (calibration / CALIBRATION_FILE).read_text()
    found = CalibrationRecord.read(calibration, "calibrate")
    assert json.dumps(asdict(found), indent=2) + "\n" == content, "nothing is lost, and the order is that of the file"
    found.write(tmp_path)
    assert (tmp_path / CALIBRATION_FILE).read_text() == content
    later = json.loads(content) | {"of_a_later_version": 1}
    (tmp_path / CALIBRATION_FILE).write_text(json.dumps(later))
    assert CalibrationRecord.read(tmp_path, "calibrate again") == found
    (tmp_path / CALIBRATION_FILE).write_text("{}")
    with pytest.raises(HeaprError, match="is damaged .*missing required field `dataset`.*; calibrate again"):
        CalibrationRecord.read(tmp_path, "calibrate again")
    with pytest.raises(HeaprError, match="calibration.json is missing; calibrate again"):
        CalibrationRecord.read(tmp_path / "nowhere", "calibrate again")
