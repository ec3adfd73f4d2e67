# SPDX-License-Identifier: Apache-2.0
"""Plain checkpoints through llama.cpp's own converter into transformers and llama.cpp."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from heapr_vllm.prune import export_checkpoint
from heapr_vllm.prune.models.deepseek import register_deepseek_model
from tests import llama_cpp, tiny_models
from tests.prune.export.test_plain import pruned

FAMILIES = ("qwen3_moe", "qwen2_moe", "deepseek", "deepseek_v2", "glm4_moe", "mixtral", "olmoe")
WANTED_BY_LLAMA_CPP = {"deepseek_v2": {"q_lora_rank": 32}}  # as DeepSeek-V2 has; without only with V2-Lite's 27 layers
TOKENS_OF_GLM = ["[gMASK]", "<|user|>", "<|observation|>"]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return llama_cpp.sources(tmp_path_factory.mktemp("llama_cpp"))


@pytest.fixture(scope="module")
def converted(
    request: pytest.FixtureRequest, sources: Path, corpus: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path]:
    """The plain checkpoint of a family with half of its neurons, and the GGUF file of it."""
    register_deepseek_model()
    family, folder = request.param, tmp_path_factory.mktemp(request.param)
    model_type, own = tiny_models.OWN[family]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(tiny_models.OWN, family, (model_type, own | WANTED_BY_LLAMA_CPP.get(family, {})))
        base = tiny_models.save(family, folder / "base")
    masks = pruned(base, corpus, folder, "--scope", "uniform")
    export_checkpoint(masks, folder / "plain", layout="plain")
    _complete_tokenizer(folder / "plain")
    ended = llama_cpp.convert(sources, folder / "plain", folder / "model.gguf")
    assert not ended.returncode, ended.stderr[-2000:]
    return folder / "plain", folder / "model.gguf"


@pytest.mark.parametrize("converted", ["qwen3_moe"], indirect=True)
def test_transformers_reads_it(converted: tuple[Path, Path]) -> None:
    """The same logits to the bit. Its reader knows no other of our families, or reads the unpruned model wrongly."""
    plain, gguf = converted
    ids = torch.arange(60)[None]
    wanted = AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32)(ids).logits
    found = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)(ids).logits
    assert torch.equal(found, wanted)


@pytest.mark.parametrize("converted", FAMILIES, indirect=True)
def test_llama_cpp_continues_alike(converted: tuple[Path, Path]) -> None:
    plain, gguf = converted
    prompt = list(range(5, 15))
    model = AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32)
    model.generation_config.eos_token_id = None
    wanted = model.generate(torch.tensor([prompt]), max_new_tokens=16, do_sample=False)[0, len(prompt) :]
    assert llama_cpp.greedy(gguf, prompt, 16) == wanted.tolist()


def _complete_tokenizer(folder: Path) -> None:
    """llama.cpp wants a BPE tokenizer to merge something, its converter the special tokens of GLM."""
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"]["ab"] = 257
    tokenizer["model"]["merges"] = [["a", "b"]]
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    completed = AutoTokenizer.from_pretrained(folder)
    completed.add_tokens(TOKENS_OF_GLM, special_tokens=True)
    completed.save_pretrained(folder)
