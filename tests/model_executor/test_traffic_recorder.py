# SPDX-License-Identifier: Apache-2.0
"""HEAPR_TRAFFIC: what an engine records of its traffic equals what calibration counts of the same tokens."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from heapr_vllm.formats.traffic import LayerTraffic, Traffic
from heapr_vllm.prune import collect_moments
from heapr_vllm.prune.export.combined_masks import combine_masks
from tests.model_executor import engine

pytestmark = pytest.mark.vllm


@pytest.fixture(scope="module")
def full(masks_repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("full") / "full"
    combine_masks("full", [masks_repository], output)
    return output


def counted(model: Path, texts: list[list[int]]) -> dict[str, LayerTraffic]:
    """What calibration sees of the texts, a sample each."""
    in_transformers = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    parts = [collect_moments(in_transformers, torch.tensor([ids])).layers for ids in texts]
    return {
        prefix: LayerTraffic(
            torch.stack([part[prefix].activation_sq for part in parts]).sum(0),
            torch.stack([part[prefix].tokens for part in parts]).sum(0),
        )
        for prefix in parts[0]
    }


MODES = {
    "eager": {},
    "compiled": {"enforce_eager": False},
    "reference": {"env": {"HEAPR_KERNEL": "reference"}},
    "two ranks": {"env": engine.TWO_RANKS, "tensor_parallel_size": 2},
}


@pytest.mark.parametrize(
    "modes", [("eager", "compiled"), pytest.param(("reference", "two ranks"), marks=pytest.mark.slow)], ids=" and ".join
)
def test_equals_calibration_on_the_same_tokens(modes: tuple[str, ...], full: Path, qwen3: Path, tmp_path: Path) -> None:
    """Two runs add up, and nothing of the engine's start is in them. The last token that is made is fed to nobody."""
    texts = []
    for mode in modes:
        options = {"load_format": "heapr", **MODES[mode]}
        options["env"] = options.get("env", {}) | {"HEAPR_TRAFFIC": str(tmp_path)}
        (found,) = engine.results(engine.run(full, **options))
        texts += [prompt + ids[:-1] for prompt, ids in zip(engine.PROMPTS, found["ids"], strict=True)]
    recorded, expected = Traffic.load(tmp_path), counted(qwen3, texts)
    assert recorded.runs == 2 and recorded.layers.keys() == expected.keys()
    for prefix, layer in expected.items():
        assert torch.equal(recorded.layers[prefix].tokens, layer.tokens)
        energy = recorded.layers[prefix].activation_sq
        torch.testing.assert_close(energy, layer.activation_sq.float(), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(
    ("env", "message"),
    [
        ({}, "HEAPR_TRAFFIC records the unpruned model; serve masks that keep everything"),
        ({"HEAPR_KERNEL": "native"}, "it does not add up traffic; unset HEAPR_TRAFFIC"),
    ],
    ids=["pruned", "kernel"],
)
def test_refused(env: dict, message: str, masks_repository: Path, full: Path, tmp_path: Path) -> None:
    model = full if env else masks_repository
    process = engine.run(model, load_format="heapr", env=env | {"HEAPR_TRAFFIC": str(tmp_path)})
    assert process.returncode != 0 and message in process.stdout + process.stderr
    assert not list(tmp_path.iterdir())
