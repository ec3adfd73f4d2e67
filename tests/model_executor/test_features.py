# SPDX-License-Identifier: Apache-2.0
"""Features of the engine around pruned experts: the answers are those of stock vLLM on the zeroed checkpoint.

Sleep mode is refused by vLLM itself on CPUs, so nothing of it is tested here.
"""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from heapr_vllm.prune import export_checkpoint
from tests.model_executor import engine
from tools import families

pytestmark = [pytest.mark.vllm, pytest.mark.slow]
RANK, SCALING = 4, 2.0
HAS_RUNAI = importlib.util.find_spec("runai_model_streamer") is not None
VARIANTS = {
    "prefix caching": {"enable_prefix_caching": True, "block_size": 32},  # LONG_PROMPT fills two
    "chunked prefill": {"enable_chunked_prefill": True, "max_num_batched_tokens": 16, "max_num_seqs": 8},
    "LoRA": {"enable_lora": True, "max_lora_rank": 8, "lora_target_modules": ["q_proj", "v_proj"]},
    "runai_streamer": {"load_format": "runai_streamer"},
    "MTP drafts": {"speculative_config": {"method": "mtp", "num_speculative_tokens": 2}},
    # last, because vLLM 0.32 starts no other engine in the process afterwards
    "n-gram drafts": {"speculative_config": {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 2}},
}


@pytest.fixture(scope="module")
def pruned(masks_repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`compact` and `zeroed`, and with an adapter on the attention `lora` and `merged`."""
    folder = tmp_path_factory.mktemp("pruned")
    for layout in ("compact", "zeroed", "merged"):
        export_checkpoint(masks_repository, folder / layout, layout="compact" if layout == "compact" else "zeroed")
    adapter = attention_adapter(load_file(folder / "zeroed" / "model.safetensors"))
    save_adapter(adapter, folder / "lora")
    tensors = load_file(folder / "merged" / "model.safetensors")
    for module, (down, up) in adapter.items():
        tensors[f"{module}.weight"] += SCALING * up @ down
    save_file(tensors, folder / "merged" / "model.safetensors", metadata={"format": "pt"})
    return folder


def attention_adapter(tensors: dict[str, torch.Tensor]) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Random A [RANK, in] and B [out, RANK] for every q_proj and v_proj."""
    generator = torch.Generator().manual_seed(3)
    modules = [name.removesuffix(".weight") for name in sorted(tensors) if ".q_proj." in name or ".v_proj." in name]
    return {
        module: (
            0.1 * torch.randn(RANK, tensors[f"{module}.weight"].shape[1], generator=generator),
            0.1 * torch.randn(tensors[f"{module}.weight"].shape[0], RANK, generator=generator),
        )
        for module in modules
    }


def save_adapter(adapter: dict[str, tuple[torch.Tensor, torch.Tensor]], folder: Path) -> None:
    """The two files of a PEFT adapter."""
    folder.mkdir()
    save_file(
        {
            f"base_model.model.{module}.lora_{letter}.weight": matrix
            for module, pair in adapter.items()
            for letter, matrix in zip("AB", pair, strict=True)
        },
        folder / "adapter_model.safetensors",
    )
    (folder / "adapter_config.json").write_text(
        json.dumps(
            {
                "peft_type": "LORA",
                "r": RANK,
                "lora_alpha": SCALING * RANK,
                "target_modules": ["q_proj", "v_proj"],
                "bias": "none",
                "task_type": "CAUSAL_LM",
            }
        )
    )


@pytest.fixture(scope="module")
def with_mtp(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a GLM-4-MoE with a multi-token-prediction layer, whose experts are whole in every checkpoint."""
    return families.prepare("glm4_moe", tmp_path_factory.mktemp("mtp"), corpus, edit_base=add_mtp_layer)


def add_mtp_layer(base: Path) -> None:
    """Turns the last decoder layer of a checkpoint into an MTP layer."""
    config = json.loads((base / "config.json").read_text())
    last, hidden = config["num_hidden_layers"] - 1, config["hidden_size"]
    config |= {"num_hidden_layers": last, "num_nextn_predict_layers": 1}
    (base / "config.json").write_text(json.dumps(config))
    tensors = load_file(base / "model.safetensors")
    own = {
        "enorm": torch.ones(hidden),
        "hnorm": torch.ones(hidden),
        "shared_head.norm": torch.ones(hidden),
        "eh_proj": torch.cat([torch.eye(hidden)] * 2, 1),
        "shared_head.head": tensors["lm_head.weight"].clone(),
        "embed_tokens": tensors["model.embed_tokens.weight"].clone(),
    }
    tensors |= {f"model.layers.{last}.{name}.weight": tensor for name, tensor in own.items()}
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})


@pytest.fixture(scope="module")
def stock(pruned: Path, with_mtp: Path) -> dict:
    """What the variants should answer."""
    models = {"plain": pruned / "zeroed", "LoRA": pruned / "merged", "MTP drafts": with_mtp / "zeroed"}
    return engine.answer_many({name: {"model": str(path)} for name, path in models.items()}, env={"VLLM_PLUGINS": ""})


@pytest.fixture(scope="module")
def served(pruned: Path, with_mtp: Path) -> dict:
    variants = {
        name: {"model": str(pruned / "compact"), **arguments}
        for name, arguments in VARIANTS.items()
        if HAS_RUNAI or name != "runai_streamer"
    }
    variants["LoRA"]["lora"] = str(pruned / "lora")
    variants["MTP drafts"]["model"] = str(with_mtp / "compact")
    return engine.answer_many(variants)


@pytest.mark.parametrize("feature", VARIANTS)
def test_answers_equal_stock(feature: str, served: dict, stock: dict) -> None:
    if feature not in served:
        pytest.skip("needs runai-model-streamer")
    assert not isinstance(served[feature], str), served[feature]
    for found in served[feature]:
        expected = stock.get(feature, stock["plain"])[0]
        assert found["ids"] == expected["ids"]
        for logprobs, wanted in zip(found["logprobs"], expected["logprobs"], strict=True):
            assert logprobs == pytest.approx(wanted, abs=1e-4)


def test_features_took_effect(served: dict, stock: dict) -> None:
    assert [answers["cached"] > 0 for answers in served["prefix caching"]] == [False, True]
    assert served["n-gram drafts"][-1]["drafted"] > 0 and served["MTP drafts"][-1]["drafted"] > 0
    assert stock["LoRA"][0]["ids"] != stock["plain"][0]["ids"]
