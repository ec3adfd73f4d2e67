# SPDX-License-Identifier: Apache-2.0
"""The baseline's predictions are kept, taken again, and completed after a kill."""

from dataclasses import replace
from pathlib import Path

import pytest

from heapr_vllm.errors import HeaprError
from heapr_vllm.evaluation import in_transformers
from heapr_vllm.evaluation.compare import evaluate
from heapr_vllm.evaluation.settings import EvaluationSettings


@pytest.fixture
def predicted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Samples that were run through a model, in order."""
    seen: list[int] = []
    original = in_transformers._predict

    def predict(model, samples, missing, *others) -> None:
        seen.extend(missing)
        original(model, samples, missing, *others)

    monkeypatch.setattr(in_transformers, "_predict", predict)
    return seen


def test_resume(masks_repository: Path, qwen3: Path, corpus: Path, tmp_path: Path, predicted: list[int]) -> None:
    models = [str(qwen3), str(masks_repository)]
    settings = EvaluationSettings(dataset=str(corpus), num_samples=4, max_seq_length=64, cache=str(tmp_path))
    first = evaluate(models, settings)
    assert predicted == [0, 1, 2, 3] * 2
    predicted.clear()
    (folder,) = tmp_path.iterdir()
    (folder / "sample-000002.safetensors").unlink()
    assert evaluate(models, settings) == first and predicted == [2, 0, 1, 2, 3]
    predicted.clear()
    assert evaluate([str(qwen3)], settings).models[0] == first.models[0] and predicted == []
    (folder / "sample-000002.safetensors").write_bytes(b"\x00" * 9)
    with pytest.raises(HeaprError, match="sample-000002.safetensors is damaged .*; remove it and evaluate again"):
        evaluate(models, settings)


def test_other_text_or_weights_are_kept_apart(tiny: Path, corpus: Path, tmp_path: Path) -> None:
    settings = EvaluationSettings(dataset=str(corpus), num_samples=2, max_seq_length=32, cache=str(tmp_path))
    for other in (settings, replace(settings, seed=1), replace(settings, top_k=3), replace(settings, dtype="bfloat16")):
        evaluate([str(tiny)], other)
    assert len(list(tmp_path.iterdir())) == 4
    weights = tiny / "model.safetensors"
    weights.touch()
    evaluate([str(tiny)], settings)
    assert len(list(tmp_path.iterdir())) == 5
