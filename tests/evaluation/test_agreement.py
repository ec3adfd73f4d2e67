# SPDX-License-Identifier: Apache-2.0
"""Divergence from the baseline: through files, from the definition, from part of the vocabulary."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from heapr_vllm.evaluation.agreement import agreement, divergence
from heapr_vllm.evaluation.perplexity import next_token_logits, perplexity
from heapr_vllm.evaluation.predictions import Predictions, PredictionsFolder
from heapr_vllm.formats.masks import NeuronMasks
from heapr_vllm.prune.models.pruned import applied

SAMPLES = torch.randint(0, 256, (5, 40), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def model(qwen3: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(qwen3, dtype=torch.float32)


@pytest.fixture(scope="module")
def logits(model: PreTrainedModel, awkward_masks: NeuronMasks) -> tuple[torch.Tensor, torch.Tensor]:
    """Of both models in memory, [5, 39, V]."""
    dense = torch.stack([logits for logits, _ in next_token_logits(model, SAMPLES)])
    with applied(awkward_masks, model):
        return dense, torch.stack([logits for logits, _ in next_token_logits(model, SAMPLES, batch_size=2)])


@pytest.fixture(scope="module")
def expected(logits: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """KL(dense || pruned) by definition, [5, 39]."""
    p, q = (each.double().log_softmax(-1) for each in logits)
    return (p.exp() * (p - q)).sum(-1)


def written(folder: Path, logits: torch.Tensor, top_k: int, teacher: PredictionsFolder | None) -> PredictionsFolder:
    found = PredictionsFolder(folder)
    for index, (each, sample) in enumerate(zip(logits, SAMPLES, strict=True)):
        tokens = teacher.read(index).tokens if teacher else None
        found.write(index, Predictions.of_logits(each, sample[1:], top_k, tokens))
    return found


@pytest.mark.parametrize("same_tokens", [True, False], ids=["teacher's tokens", "own tokens"])
@pytest.mark.parametrize("top_k", [1, 64, 320])
def test_cached_equals_in_memory(
    top_k: int, same_tokens: bool, logits: tuple[torch.Tensor, ...], expected: torch.Tensor, tmp_path: Path
) -> None:
    dense, pruned = logits
    teacher = written(tmp_path, dense, top_k, None)
    (tmp_path / "student").mkdir()
    student = written(tmp_path / "student", pruned, top_k, teacher if same_tokens else None)
    found = agreement("dense", teacher.read_all(5), student.read_all(5), top_k)
    exact = expected.mean().item()
    assert exact > 0.1
    if top_k == 320:  # the whole vocabulary
        assert found.kl_divergence == pytest.approx(exact, abs=1e-4)
    else:
        assert (0.3 if top_k == 64 and same_tokens else 0) * exact < found.kl_divergence <= exact
    assert found.kl_low < found.kl_divergence < found.kl_high
    same = (dense.argmax(-1) == pruned.argmax(-1)).sum().item()
    assert found.top1 == same / (5 * 39) and found.tokens == 5 * 39 and found.top1_low < found.top1 < found.top1_high


def test_lumping_is_the_divergence_of_lumped_distributions(logits: tuple[torch.Tensor, torch.Tensor]) -> None:
    dense, pruned = (each[0] for each in logits)
    teacher = Predictions.of_logits(dense, SAMPLES[0, 1:], 7)
    student = Predictions.of_logits(pruned, SAMPLES[0, 1:], 7, teacher.tokens)
    p, q = (each.double().softmax(-1).gather(1, teacher.tokens.long()) for each in (dense, pruned))
    p, q = (torch.cat([each, 1 - each.sum(1, keepdim=True)], dim=1) for each in (p, q))
    torch.testing.assert_close(divergence(teacher, student), (p * (p / q).log()).sum(1), rtol=1e-4, atol=1e-6)


def test_no_divergence_from_itself(logits: tuple[torch.Tensor, torch.Tensor]) -> None:
    teacher = Predictions.of_logits(logits[0][0], SAMPLES[0, 1:], 64)
    assert not divergence(teacher, teacher).any()


def test_files_have_the_size_that_is_announced(logits: tuple[torch.Tensor, torch.Tensor], tmp_path: Path) -> None:
    written(tmp_path, logits[0], 64, None)
    size = sum(path.stat().st_size for path in tmp_path.iterdir())
    assert Predictions.num_bytes(5 * 39, 64) == pytest.approx(size, rel=0.05)


def test_perplexity_from_files(model: PreTrainedModel, logits: tuple[torch.Tensor, ...], tmp_path: Path) -> None:
    assert written(tmp_path, logits[0], 1, None).perplexity(5) == pytest.approx(perplexity(model, SAMPLES), rel=1e-6)
