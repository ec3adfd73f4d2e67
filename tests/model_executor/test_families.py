# SPDX-License-Identifier: Apache-2.0
"""Every family served exactly, compact and as masks over its base.

All modes, as a table: `python -m tools.families`.
"""

from itertools import product
from pathlib import Path

import pytest

from tests import tiny_models
from tools import families

TWO_RANKS = ("qwen2_moe", "glm4_moe")  # shared experts with and without a gate, a dense first layer
FAMILIES = [family for family in tiny_models.OWN if family not in families.NOT_SERVED_HERE]


@pytest.fixture(scope="module")
def folders(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folder of every family that transformers can calibrate."""
    root = tmp_path_factory.mktemp("families")
    return {family: families.prepare(family, root, corpus) for family in tiny_models.OWN}


@pytest.mark.slow
def test_every_family_is_calibrated_and_exported(folders: dict[str, Path]) -> None:
    for family, folder in folders.items():
        assert all((folder / name / "config.json").is_file() for name in ("masks", "compact", "zeroed")), family


def output(logprob: float, token: int = 7) -> families.Output:
    return {"ids": [[token]], "logprobs": [[logprob]]}


@pytest.mark.parametrize(
    ("family", "found", "alike", "cell"),
    [
        ("qwen3_moe", output(-1.00001), None, "yes"),
        ("qwen3_moe", output(-1.0, token=8), output(-1.0), "no"),
        ("qwen3_moe", output(-1.01), output(-1.0), "no"),
        ("qwen3_moe", output(-3.0), output(-3.00001), "as stock"),
        ("qwen3_moe", output(-3.0), output(-3.1), "no"),
        ("qwen3_moe", "ValueError: x", "ValueError: y", "vLLM"),
        ("qwen3_moe", "ValueError: x", output(-1.0), "no"),
        ("qwen3_moe", families.engine.NO_ANSWER, None, families.engine.NO_ANSWER),
        ("qwen3_next_linear", output(-1.01), None, "yes"),
        ("qwen3_next_linear", output(-1.2), output(-0.7), "as stock"),
        ("qwen3_next_linear", output(-1.2), output(-0.9), "no"),
    ],
)
def test_cells(family: str, found: families.Output, alike: families.Output | None, cell: str) -> None:
    outputs = {"stock": {family: output(-1.0)}, "m": {family: found}, "stock m": {family: alike} if alike else {}}
    assert families.cell(family, "m", outputs) == cell


@pytest.fixture(scope="module")
def served(folders: dict[str, Path]) -> dict[str, dict[str, families.Output]]:
    """Mode, or "stock", to family to output."""
    paths = [folders[family] for family in FAMILIES]
    outputs = {mode: dict(families.serve(paths, families.MODES[mode])) for mode in ("compact", "masks")}
    outputs["TP=2"] = dict(families.serve([folders[family] for family in TWO_RANKS], families.MODES["TP=2"]))
    return outputs | {"stock": dict(families.stock(paths))}


@pytest.mark.slow
@pytest.mark.vllm
@pytest.mark.parametrize(("mode", "family"), [*product(("compact", "masks"), FAMILIES), *product(("TP=2",), TWO_RANKS)])
def test_output_equals_stock(mode: str, family: str, served: dict[str, dict[str, families.Output]]) -> None:
    found, expected = served[mode][family], served["stock"][family]
    assert not isinstance(expected, str), f"stock vLLM: {expected}"
    assert not isinstance(found, str), found
    assert families.same(family, found, expected)


@pytest.mark.slow
@pytest.mark.vllm
@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in families.TOLERANCES])
def test_stock_runs_what_was_calibrated(
    family: str, folders: dict[str, Path], served: dict[str, dict[str, families.Output]]
) -> None:
    """vLLM and transformers read the same model out of the same config: rotary angles, routing, scales."""
    found, expected = families.in_transformers(folders[family]), served["stock"][family]
    assert not isinstance(expected, str), f"stock vLLM: {expected}"
    assert families.distance(found, expected) < families.TOLERANCE
