# SPDX-License-Identifier: Apache-2.0
"""What vLLM serves of base, masks and adapter is what transformers and PEFT compute of them."""

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torch import nn

from heapr_vllm.formats.checkpoint import Checkpoint
from heapr_vllm.prune import export_checkpoint
from heapr_vllm.prune.models.pruned import opened
from serving_examples.healing.heal import heal
from serving_examples.healing.settings import ATTENTION, HealingSettings
from tests.model_executor import engine

pytestmark = pytest.mark.vllm
NEW_TOKENS = 16


@pytest.fixture(scope="module")
def adapter(masks_repository: Path, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("adapter") / "healed"
    settings = HealingSettings(
        dataset=str(corpus), num_samples=52, max_seq_length=32, dtype="float32", learning_rate=5e-3
    )
    heal(masks_repository, output, settings)
    return output


@torch.no_grad()
def answers(model: nn.Module) -> dict[str, list]:
    """Greedy ids and prompt logprobs, as `engine.generate` gives them."""
    found: dict[str, list] = {"ids": [], "logprobs": []}
    for prompt in engine.PROMPTS:
        ids = torch.tensor([prompt])
        logprobs = model(ids).logits[0, :-1].log_softmax(-1)
        found["logprobs"].append(logprobs.gather(1, ids[0, 1:, None])[:, 0].tolist())
        for _ in range(NEW_TOKENS):
            ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], 1)
        found["ids"].append(ids[0, len(prompt) :].tolist())
    return found


@pytest.fixture(scope="module")
def expected(adapter: Path, masks_repository: Path) -> list[dict[str, list]]:
    """Without and with the adapter."""
    with opened(Checkpoint(masks_repository), "float32", "cpu") as (model, _):
        without = answers(model)
        return [without, answers(PeftModel.from_pretrained(model, str(adapter)))]


@pytest.fixture(scope="module")
def served(adapter: Path, masks_repository: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list]:
    compact = tmp_path_factory.mktemp("compact") / "compact"
    export_checkpoint(masks_repository, compact)
    lora = {"enable_lora": True, "max_lora_rank": 16, "lora_target_modules": list(ATTENTION), "lora": str(adapter)}
    variants = {
        "masks over the base": {"model": str(masks_repository), "load_format": "heapr", "dtype": "float32"},
        "compact": {"model": str(compact)},
    }
    return engine.answer_many(
        {name: variant | lora for name, variant in variants.items()}, ask="generate_without_and_with"
    )


@pytest.mark.parametrize("variant", ["masks over the base", "compact"])
def test_served_equals_peft(variant: str, served: dict[str, list], expected: list[dict[str, list]]) -> None:
    assert not isinstance(served[variant], str), served[variant]
    assert expected[0]["ids"] != expected[1]["ids"], "the adapter changes answers"
    for found, wanted in zip(served[variant], expected, strict=True):
        assert found["ids"] == wanted["ids"]
        for logprobs, wanted_logprobs in zip(found["logprobs"], wanted["logprobs"], strict=True):
            assert logprobs == pytest.approx(wanted_logprobs, abs=1e-4)
