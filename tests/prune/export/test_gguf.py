# SPDX-License-Identifier: Apache-2.0
"""Plain checkpoints through llama.cpp's own converter into transformers and llama.cpp."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from heapr_vllm.prune import export_checkpoint
from heapr_vllm.prune.models.deepseek import register_deepseek_model
from tests import llama_cpp, tiny_models
from tests.prune.export.test_plain import pruned

FAMILIES = ("qwen3_moe", "qwen2_moe", "deepseek", "deepseek_v2", "glm4_moe", "mixtral", "olmoe")
READ_BY_TRANSFORMERS = ("qwen3_moe", "qwen2_moe")

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return llama_cpp.sources(tmp_path_factory.mktemp("llama_cpp"))


@pytest.fixture(scope="module", params=FAMILIES)
def converted(
    request: pytest.FixtureRequest, sources: Path, corpus: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Path, Path]:
    """A family, its plain checkpoint with half of the neurons, and the GGUF file of it."""
    register_deepseek_model()
    folder = tmp_path_factory.mktemp(request.param)
    masks = pruned(tiny_models.save(request.param, folder / "base"), corpus, folder, "--scope", "uniform")
    export_checkpoint(masks, folder / "plain", layout="plain")
    _add_merge(folder / "plain" / "tokenizer.json")
    ended = llama_cpp.convert(sources, folder / "plain", folder / "model.gguf")
    assert not ended.returncode, ended.stderr[-2000:]
    return request.param, folder / "plain", folder / "model.gguf"


def test_transformers_reads_it(converted: tuple[str, Path, Path]) -> None:
    """The same logits to the bit."""
    family, plain, gguf = converted
    if family not in READ_BY_TRANSFORMERS:
        with pytest.raises(ValueError, match="GGUF model with architecture .* is not supported yet"):
            AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name)
        return
    ids = torch.arange(60)[None]
    wanted = AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32)(ids).logits
    found = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)(ids).logits
    assert torch.equal(found, wanted)


def test_llama_cpp_continues_alike(converted: tuple[str, Path, Path]) -> None:
    _, plain, gguf = converted
    prompt = list(range(5, 15))
    model = AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32)
    model.generation_config.eos_token_id = None
    wanted = model.generate(torch.tensor([prompt]), max_new_tokens=16, do_sample=False)[0, len(prompt) :]
    assert llama_cpp.greedy(gguf, prompt, 16) == wanted.tolist()


def _add_merge(path: Path) -> None:
    """llama.cpp wants a BPE tokenizer to merge something."""
    tokenizer = json.loads(path.read_text())
    tokenizer["model"]["vocab"]["ab"] = 257
    tokenizer["model"]["merges"] = [["a", "b"]]
    path.write_text(json.dumps(tokenizer))
