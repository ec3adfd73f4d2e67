# SPDX-License-Identifier: Apache-2.0
"""The evaluation file: written and read, and refused where it is none."""

import json
from pathlib import Path

import pytest

from heapr_vllm.errors import HeaprError
from heapr_vllm.formats.evaluation_record import Agreement, EvaluationRecord, MeasuredOn, ModelRecord, TaskResult

NUMBERS = {"kl_divergence": 0.1, "top1": 0.5, "top1_low": 0.4, "top1_high": 0.6, "tokens": 30, "top_k": 4}
RECORD = EvaluationRecord(
    settings=MeasuredOn(
        dataset="text.txt", num_samples=2, max_seq_length=16, seed=0, backend="vllm", dtype="auto", tasks=("brackets",)
    ),
    versions={"python": "3.11"},
    models=(
        ModelRecord(model="base", weight_bytes=None, perplexity=8.0, change=0.0),
        ModelRecord(
            model="pruned",
            weight_bytes=5,
            perplexity=9.0,
            change=0.125,
            agreement=Agreement(against="base", **NUMBERS),
            tasks={"brackets": TaskResult(metric="exact_match", num_samples=500, value=0.7, num_fewshot=0)},
        ),
    ),
)


def test_round_trip(tmp_path: Path) -> None:
    RECORD.write(tmp_path / "evaluation.json")
    assert EvaluationRecord.read(tmp_path / "evaluation.json") == RECORD
    written = json.loads((tmp_path / "evaluation.json").read_text())
    base, pruned = written["models"]
    assert (
        written["format_version"] == 1 and base["weight_bytes"] is None and written["settings"]["num_fewshot"] is None
    )
    assert "agreement" not in base and "stored_reduction" not in base and "low" not in pruned["tasks"]["brackets"]


@pytest.mark.parametrize("change", [{"format_version": 2}, {"models": [{"model": "base"}]}, {"versions": 3}])
def test_other_files_are_refused(change: dict, tmp_path: Path) -> None:
    path = tmp_path / "evaluation.json"
    path.write_text(json.dumps(json.loads(RECORD.as_json()) | change))
    with pytest.raises(HeaprError, match="evaluation.json is damaged .*; write it again with `heapr eval -o`"):
        EvaluationRecord.read(path)
