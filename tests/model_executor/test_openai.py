# SPDX-License-Identifier: Apache-2.0
"""The real `vllm serve` process and the real OpenAI client, on the bundled model pruned by half."""

from pathlib import Path

import pytest
import torch
from openai import OpenAI
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.vllm_server import serve
from heapr_vllm.cli.main import main
from heapr_vllm.formats.masks import NeuronMasks
from heapr_vllm.prune.models.pruned import applied
from tests.conftest import BUNDLED

pytestmark = pytest.mark.vllm
PROMPT, NEW_TOKENS = "def __init__(self, name):\n", 24


def test_completions_streamed_and_whole(python_corpus: Path, tmp_path: Path) -> None:
    assert (
        main(
            [
                "calibrate",
                str(BUNDLED),
                "--dataset",
                str(python_corpus / "calibration.jsonl"),
                "-o",
                str(tmp_path / "calib"),
                "--num-calibration-samples",
                "8",
                "--max-seq-length",
                "256",
                "--dtype",
                "float32",
            ]
        )
        == 0
    )
    assert main(["prune", str(tmp_path / "calib"), "--sparsity", "0.5", "-o", str(tmp_path / "masks")]) == 0
    assert main(["export", str(tmp_path / "masks"), "-o", str(tmp_path / "pruned")]) == 0
    expected = greedy_in_transformers(NeuronMasks.from_pretrained(tmp_path / "masks"))

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


def greedy_in_transformers(masks: NeuronMasks) -> str:
    tokenizer = AutoTokenizer.from_pretrained(BUNDLED)
    model = AutoModelForCausalLM.from_pretrained(BUNDLED, dtype=torch.float32)
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids
    with applied(masks, model):
        out = model.generate(ids, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, do_sample=False)
    return tokenizer.decode(out[0, ids.shape[1] :])
