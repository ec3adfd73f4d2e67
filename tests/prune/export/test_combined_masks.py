# SPDX-License-Identifier: Apache-2.0
"""`heapr masks union`, `intersect` and `full`."""

import json
from pathlib import Path

import pytest
import torch

from heapr_vllm.cli.main import main
from heapr_vllm.formats.config import PruningConfig
from heapr_vllm.formats.pruned import read_masks
from heapr_vllm.prune import export_checkpoint


@pytest.fixture
def two(calibration: Path, tmp_path: Path) -> list[Path]:
    """The paper's score and chance, which agree on some neurons only."""
    for criterion in ("heapr", "random"):
        command = ["prune", str(calibration), "--sparsity", "0.5", "--criterion", criterion]
        assert main([*command, "-o", str(tmp_path / criterion)]) == 0
    return [tmp_path / "heapr", tmp_path / "random"]


@pytest.mark.parametrize("how", ["union", "intersect", "full"])
def test_combined(how: str, two: list[Path], tmp_path: Path) -> None:
    output = tmp_path / "combined"
    assert main(["masks", how, *map(str, two), "-o", str(output)]) == 0
    first, second, found = (read_masks(path).keep for path in (*two, output))
    for prefix, keep in found.items():
        wanted = {
            "union": first[prefix] | second[prefix],
            "intersect": first[prefix] & second[prefix],
            "full": torch.ones_like(keep),
        }
        assert keep.equal(wanted[how])
    block = PruningConfig.from_dict(json.loads((output / "config.json").read_text())["quantization_config"])
    assert block.sparsity == pytest.approx(read_masks(output).sparsity, abs=1e-6)
    assert main(["inspect", str(output)]) == 0
    export_checkpoint(output, tmp_path / "compact")
    assert read_masks(tmp_path / "compact").keep.keys() == found.keys()


def test_refused(two: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    output = ["-o", str(tmp_path / "out")]
    export_checkpoint(two[0], tmp_path / "compact")
    assert main(["masks", "union", *[str(tmp_path / "compact")] * 2, *output]) == 2
    assert "is a compact checkpoint; combine the masks it was made of" in capsys.readouterr().err
    config = json.loads((two[1] / "config.json").read_text())
    config["quantization_config"]["base_model"]["fingerprint"] = "routers:another"
    (two[1] / "config.json").write_text(json.dumps(config))
    for masks, message in (
        (two[:1], "heapr masks union needs two masks repositories or more"),
        (two, "are masks of different models; combine those of one model"),
        ([two[0], tmp_path], "is not a masks repository"),
    ):
        assert main(["masks", "union", *map(str, masks), *output]) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
