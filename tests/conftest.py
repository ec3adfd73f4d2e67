# SPDX-License-Identifier: Apache-2.0
"""Fixtures: tiny random MoE models saved as checkpoints, their moments, and masks with awkward widths."""

from pathlib import Path

import pytest
import torch

from heapr_vllm.formats.masks import NeuronMasks
from heapr_vllm.prune import CalibrationSettings, export_checkpoint, write_masks_repository
from heapr_vllm.prune.calibration.calibrate import calibrate
from heapr_vllm.prune.calibration.moments import NeuronMoments
from heapr_vllm.prune.selection.selector import select
from tests import tiny_models

BUNDLED = Path(__file__).parent.parent / "serving_examples" / "tiny_qwen3_moe"
LONGEST = ("test_families", "test_gpu_path", "test_serving", "test_quality")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Puts the longest files first, so that no worker is left with one alone at the end."""
    items.sort(key=lambda item: item.path.stem not in LONGEST)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A .jsonl of pseudo-random text, enough for a few dozen blocks of 64 byte tokens."""
    return tiny_models.write_corpus(tmp_path_factory.mktemp("corpus") / "text.jsonl")


@pytest.fixture(scope="session", params=["qwen3_moe", "qwen2_moe"])
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="session")
def tiny(family: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoint of a tiny random fp32 model of `family`."""
    return tiny_models.save(family, tmp_path_factory.mktemp(family) / "base")


@pytest.fixture(scope="session")
def qwen3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoint of a tiny random fp32 Qwen3-MoE."""
    return tiny_models.save("qwen3_moe", tmp_path_factory.mktemp("qwen3") / "base")


@pytest.fixture(scope="session")
def calibration(qwen3: Path, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder written by `heapr calibrate` for `qwen3`."""
    output = tmp_path_factory.mktemp("calibration") / "calib"
    calibrate(
        CalibrationSettings(model=str(qwen3), dataset=str(corpus), num_calibration_samples=6, max_seq_length=64), output
    )
    return output


@pytest.fixture(scope="session")
def awkward_masks(calibration: Path) -> NeuronMasks:
    """Masks for `qwen3` with widths 0, 1, odd and full among the experts of every layer."""
    return awkward(NeuronMoments.from_pretrained(calibration))


@pytest.fixture(scope="session")
def masks_repository(awkward_masks: NeuronMasks, calibration: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Masks repository of `awkward_masks`."""
    output = tmp_path_factory.mktemp("masks") / "masks"
    write_masks_repository(awkward_masks, calibration, output)
    return output


@pytest.fixture(scope="session")
def python_corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Calibration and held-out text of the bundled model, written from the installed Python sources."""
    from serving_examples import python_corpus as corpus

    folder = tmp_path_factory.mktemp("python_corpus")
    for split, files in corpus.build().items():
        if split != "train":
            corpus.write_jsonl(folder / f"{split}.jsonl", files.items())
    return folder


def prune(base: Path, corpus: Path, folder: Path, sparsity: float, num_samples: int = 4) -> None:
    """Writes `masks` and `compact` of a base model into `folder`."""
    calibrate(
        CalibrationSettings(
            model=str(base), dataset=str(corpus), num_calibration_samples=num_samples, max_seq_length=64
        ),
        folder / "calib",
    )
    masks = select(NeuronMoments.from_pretrained(folder / "calib"), sparsity=sparsity)
    write_masks_repository(masks, folder / "calib", folder / "masks")
    export_checkpoint(folder / "masks", folder / "compact")


def awkward(moments: NeuronMoments) -> NeuronMasks:
    """Random masks whose first four experts keep 0, 1, 13 and all neurons, in another order in every layer."""
    generator = torch.Generator().manual_seed(7)
    keep = {}
    for layer, (prefix, sums) in enumerate(moments.layers.items()):
        experts, width = sums.fisher.shape
        counts = [0, 1, 13, width, *torch.randint(2, width, (experts - 4,), generator=generator).tolist()]
        counts = counts[layer:] + counts[:layer]
        rank = torch.rand(experts, width, generator=generator).argsort(-1).argsort(-1)
        keep[prefix] = rank < torch.tensor(counts)[:, None]
    metadata = {
        "criterion": "random",
        "scope": "expert",
        "align": 1,
        "min_width": 0,
        "sparsity": None,
        "tokens": {prefix: tokens.tolist() for prefix, tokens in moments.tokens.items()},
        "base_model": {
            "name_or_path": moments.metadata["model"],
            "revision": None,
            "fingerprint": moments.metadata["base_fingerprint"],
        },
    }
    return NeuronMasks(keep, metadata)
