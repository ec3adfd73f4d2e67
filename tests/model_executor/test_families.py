# SPDX-License-Identifier: Apache-2.0
"""Every family served exactly, compact and as masks over its base.

All modes, as a table: `python -m tests.model_executor.families`.
"""

from pathlib import Path

import pytest

from tests import tiny_models
from tests.model_executor import families

FAMILIES = [family for family in tiny_models.OWN if family not in families.NOT_SERVED_HERE]


@pytest.fixture(scope="module")
def folders(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folder of every family that transformers can calibrate."""
    root = tmp_path_factory.mktemp("families")
    return {family: families.prepare(family, root, corpus) for family in tiny_models.OWN}


def test_every_family_is_calibrated_and_exported(folders: dict[str, Path]) -> None:
    for family, folder in folders.items():
        assert all((folder / name / "config.json").is_file() for name in ("masks", "compact", "masked")), family


@pytest.fixture(scope="module")
def served(folders: dict[str, Path]) -> dict[str, dict[str, dict | None]]:
    """Mode, or "stock", to family to output."""
    paths = [folders[family] for family in FAMILIES]
    outputs = {mode: families.serve(paths, families.MODES[mode]) for mode in ("compact", "masks")}
    outputs["stock"] = families.stock(paths)
    return {mode: dict(zip(FAMILIES, found, strict=True)) for mode, found in outputs.items()}


@pytest.mark.vllm
@pytest.mark.parametrize("mode", ["compact", "masks"])
@pytest.mark.parametrize("family", FAMILIES)
def test_output_equals_stock(family: str, mode: str, served: dict[str, dict[str, dict | None]]) -> None:
    assert served["stock"][family], "stock vLLM failed"
    assert families.same(served[mode][family], served["stock"][family])
