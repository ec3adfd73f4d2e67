# SPDX-License-Identifier: Apache-2.0
"""HEAPr on a trained model: better than what it is compared with, at equal stored size."""

from pathlib import Path

import pytest

from benchmarks.quality import SPARSITIES, measure
from serving_examples import train_tiny_qwen3_moe
from tests.conftest import BUNDLED


@pytest.fixture(scope="module")
def result(python_corpus: Path) -> dict:
    return measure(python_corpus, num_samples=48, num_blocks=48)


def test_bundled_model_is_trained(python_corpus: Path) -> None:
    """The two numbers of its model card; the held-out text differs a little between environments."""
    card = train_tiny_qwen3_moe.measure(python_corpus, BUNDLED, num_blocks=600)
    assert card["perplexity"] < 12 and card["least_expert_share"] > 0.25


@pytest.mark.parametrize("sparsity", SPARSITIES)
def test_heapr_beats_the_baselines(result: dict, sparsity: float) -> None:
    rows = {row["criterion"]: row for row in result["rows"] if row["sparsity"] == sparsity}
    assert len(rows) == 4
    assert all(row["stored_reduction"] == pytest.approx(sparsity, abs=1e-3) for row in rows.values())
    others = [row["perplexity"] for name, row in rows.items() if name != "heapr"]
    assert result["dense"] < rows["heapr"]["perplexity"] < min(others)
