# SPDX-License-Identifier: Apache-2.0
"""The real `vllm serve` process and the real OpenAI client, on the bundled model: half, and a quarter in 4 bits."""

from pathlib import Path

import pytest
from openai import OpenAI
from transformers import AutoTokenizer

from benchmarks.vllm_server import serve
from heapr_vllm.cli.main import main
from heapr_vllm.formats.checkpoint import Checkpoint
from heapr_vllm.prune.models.pruned import opened
from tests.conftest import BUNDLED

pytestmark = pytest.mark.vllm
PROMPT, NEW_TOKENS = "def __init__(self, name):\n", 24


@pytest.mark.parametrize(
    ("sparsity", "export"),
    [
        pytest.param("0.5", [], id="half"),
        pytest.param("0.25", ["--quantize", "int4", "--repair", "least-squares"], id="int4", marks=pytest.mark.slow),
    ],
)
def test_completions_streamed_and_whole(sparsity: str, export: list[str], python_corpus: Path, tmp_path: Path) -> None:
    text = ["--dataset", str(python_corpus / "calibration.jsonl"), "--dtype", "float32"]
    amount = ["--num-calibration-samples", "8", "--max-seq-length", "256"]
    calib, masks, pruned = (str(tmp_path / name) for name in ("calib", "masks", "pruned"))
    assert main(["calibrate", str(BUNDLED), *text, *amount, "-o", calib]) == 0
    assert main(["prune", calib, "--sparsity", sparsity, "-o", masks]) == 0
    assert main(["export", masks, *export, "-o", pruned]) == 0
    expected = greedy_in_transformers(Path(pruned))

    with serve(
        tmp_path / "pruned",
        "--dtype",
        "float32",
        "--max-model-len",
        "256",
        "--enforce-eager",
        "--served-model-name",
        "tiny",
        log=tmp_path / "serve.log",
    ) as url:
        client = OpenAI(base_url=f"{url}/v1", api_key="none")
        assert [model.id for model in client.models.list()] == ["tiny"]
        request = {
            "model": "tiny",
            "prompt": PROMPT,
            "max_tokens": NEW_TOKENS,
            "temperature": 0,
            "extra_body": {"ignore_eos": True},
        }
        whole = client.completions.create(**request)
        assert whole.choices[0].text == expected and whole.usage.completion_tokens == NEW_TOKENS
        chunks = [chunk.choices[0].text for chunk in client.completions.create(**request, stream=True)]
        assert len(chunks) > 1 and "".join(chunks) == expected


def greedy_in_transformers(pruned: Path) -> str:
    tokenizer = AutoTokenizer.from_pretrained(pruned)
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids
    with opened(Checkpoint(pruned), "float32", "cpu") as (model, _):
        out = model.generate(ids, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, do_sample=False)
    return tokenizer.decode(out[0, ids.shape[1] :])
