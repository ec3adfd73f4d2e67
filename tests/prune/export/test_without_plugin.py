# SPDX-License-Identifier: Apache-2.0
"""What transformers and vLLM say about models for the plugin when it is not there, word by word."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from heapr_vllm.prune import export_checkpoint
from heapr_vllm.prune.export.unpacked import unpack

pytestmark = pytest.mark.long

OPEN = "import sys; from transformers import AutoModelForCausalLM as A; A.from_pretrained(sys.argv[1])"


@pytest.fixture(scope="module", params=["masks", "compact", "int8"])
def packed(request: pytest.FixtureRequest, masks_repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    if request.param == "masks":
        return masks_repository
    output = tmp_path_factory.mktemp("packed") / request.param
    export_checkpoint(masks_repository, output, quantize="int8" if request.param == "int8" else None)
    return output


def test_transformers_names_the_remedy(packed: Path) -> None:
    """In a process of its own, which has not imported this package."""
    ended = subprocess.run([sys.executable, "-c", OPEN, str(packed)], capture_output=True, text=True)
    last = ended.stderr.splitlines()[-1]
    assert ended.returncode == 1
    assert re.search(r"No such file .*/install-heapr-vllm-then-run-heapr-unpack\.safetensors$", last)


def test_transformers_loads_what_the_remedy_writes(packed: Path, tmp_path: Path) -> None:
    unpack(packed, tmp_path / "full")
    model, found = AutoModelForCausalLM.from_pretrained(tmp_path / "full", output_loading_info=True)
    assert not any(found.values())
    assert model(torch.arange(8)[None]).logits.isfinite().all()


@pytest.mark.vllm
def test_vllm_names_the_method(masks_repository: Path) -> None:
    """vLLM's text is its own, but for the name, which it takes from config.json; a note for readers stands there."""
    pytest.importorskip("vllm")
    from tests.model_executor import engine

    found = engine.run(masks_repository, env={"VLLM_PLUGINS": ""})
    assert found.returncode
    assert "Unknown quantization method: heapr. Must be one of" in found.stdout + found.stderr
    assert "`heapr unpack` writes full-size weights" in (masks_repository / "config.json").read_text()
