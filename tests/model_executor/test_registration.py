# SPDX-License-Identifier: Apache-2.0
"""The plugin as vLLM finds it."""

import json
import pickle
import shutil
from importlib.metadata import entry_points
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

pytest.importorskip("vllm")
from vllm.config.load import LoadConfig
from vllm.model_executor.layers.linear import ReplicatedLinear, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization import get_quantization_config
from vllm.model_executor.model_loader import get_model_loader

import heapr_vllm
from heapr_vllm.errors import HeaprError
from heapr_vllm.formats.masks import NeuronMasks
from heapr_vllm.model_executor.model_loader import HeaprModelLoader
from heapr_vllm.model_executor.quantization import HeaprConfig
from heapr_vllm.prune import export_checkpoint


def test_entry_point_registers_more_than_once() -> None:
    (entry,) = (entry for entry in entry_points(group="vllm.general_plugins") if entry.name == "heapr")
    for _ in range(2):
        entry.load()()
    heapr_vllm.register()
    assert get_quantization_config("heapr") is HeaprConfig
    assert isinstance(get_model_loader(LoadConfig(load_format="heapr")), HeaprModelLoader)


def test_config_travels_small_and_reads_masks_again(masks_repository: Path) -> None:
    config = HeaprConfig.from_config({"quant_method": "heapr"})
    config.maybe_update_config(str(masks_repository))
    assert len(config.masks.keep) == 3
    data = pickle.dumps(config)
    assert len(data) < 2000
    assert pickle.loads(data).masks.widths.keys() == config.masks.widths.keys()


def test_config_without_arguments_for_dash_q() -> None:
    assert HeaprConfig.get_config_filenames() == []
    assert HeaprConfig().pruning.masks == "heapr/masks.safetensors"


def test_masks_may_be_a_directory_given_by_the_user(masks_repository: Path, qwen3: Path) -> None:
    config = HeaprConfig.from_config({"masks": str(masks_repository)})
    config.maybe_update_config(str(qwen3), SimpleNamespace(num_hidden_layers=3))
    assert len(config.masks.keep) == 3


def test_masks_of_the_user_may_be_a_file_anywhere_those_of_a_model_not(
    masks_repository: Path, qwen3: Path, tmp_path: Path
) -> None:
    file = masks_repository / "heapr" / "masks.safetensors"
    config = HeaprConfig.from_config({"masks": str(file)})
    config.maybe_update_config(str(qwen3), SimpleNamespace(num_hidden_layers=3, hidden_size=64))
    assert config.masks_path == file
    hostile = Path(shutil.copytree(masks_repository, tmp_path / "hostile"))
    written = json.loads((hostile / "config.json").read_text())
    written["quantization_config"]["masks"] = str(file)
    (hostile / "config.json").write_text(json.dumps(written))
    config = HeaprConfig.from_config(written["quantization_config"])
    with pytest.raises(HeaprError, match="lies outside of it"):
        config.maybe_update_config(str(hostile), SimpleNamespace(num_hidden_layers=3, hidden_size=64))


def test_extra_layers_in_the_masks(masks_repository: Path) -> None:
    config = HeaprConfig.from_config({})
    with pytest.raises(HeaprError, match=r"they cover model.layers.2.mlp.experts, the model has 2 layers"):
        config.maybe_update_config(str(masks_repository), SimpleNamespace(num_hidden_layers=2))


@pytest.mark.parametrize(
    ("block", "message"),
    [
        ({"format_version": 3}, "format_version 3, this heapr-vllm reads up to 2; upgrade"),
        ({"layout": "cubist"}, "layout is 'cubist', expected one of masks, compact"),
        ({"experts": {"num_bits": 3}}, "heapr export --quantize int8"),
    ],
)
def test_bad_blocks(block: dict, message: str) -> None:
    with pytest.raises(HeaprError, match=message):
        HeaprConfig.from_config(block)


def test_files_of_version_1_are_read() -> None:
    """What `heapr prune` wrote before experts could be codes."""
    block = {"format_version": 1, "layout": "compact", "inner": None, "base_model": {"fingerprint": "sha256:0"}}
    pruning = HeaprConfig.from_config(block).pruning
    assert pruning.expert_scheme is None and pruning.base_model.fingerprint == "sha256:0"


def test_truncated_weights(masks_repository: Path, tmp_path: Path) -> None:
    export_checkpoint(masks_repository, tmp_path / "cut")
    weights = tmp_path / "cut" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])
    config = HeaprConfig.from_config({"layout": "compact"})
    with pytest.raises(HeaprError, match=r"model.safetensors is damaged .*; download it again"):
        config.maybe_update_config(str(tmp_path / "cut"))


def over(base: Path, masks_repository: Path, **block: dict) -> None:
    """What `vllm serve BASE --hf-overrides` does with the masks of a repository."""
    config = HeaprConfig.from_config({"masks": str(masks_repository), **block})
    config.maybe_update_config(str(base), SimpleNamespace(num_hidden_layers=3, hidden_size=64))


def test_masks_over_another_base(masks_repository: Path, qwen3: Path, tmp_path: Path) -> None:
    shutil.copytree(qwen3, tmp_path / "tuned")
    tensors = load_file(tmp_path / "tuned" / "model.safetensors")
    tensors["model.layers.0.mlp.gate.weight"] += 1
    save_file(tensors, tmp_path / "tuned" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(HeaprError, match='its fingerprint differs.*{"fingerprint": "any"}'):
        over(tmp_path / "tuned", masks_repository)
    over(tmp_path / "tuned", masks_repository, base_model={"fingerprint": "any"})


@pytest.mark.parametrize(
    "quantization", [{"quant_method": "gptq"}, {"quant_method": "modelopt", "quant_algo": "NVFP4"}]
)
def test_masks_over_a_base_in_another_format(
    quantization: dict, masks_repository: Path, qwen3: Path, tmp_path: Path
) -> None:
    shutil.copytree(qwen3, tmp_path / "base")
    config = json.loads((qwen3 / "config.json").read_text()) | {"quantization_config": quantization}
    (tmp_path / "base" / "config.json").write_text(json.dumps(config))
    with pytest.raises(HeaprError, match="not supported yet.*start from the unquantized base model"):
        over(tmp_path / "base", masks_repository)


def loaded_from(model: Path, block: dict, **extra: str) -> str:
    """Where `--load-format heapr` reads weights."""
    loader = HeaprModelLoader(LoadConfig(load_format="heapr", model_loader_extra_config=extra))
    hf_config = SimpleNamespace(quantization_config=block)
    return loader.base_model_config(SimpleNamespace(model=str(model), revision=None, hf_config=hf_config)).model


def test_lost_base_model_names_the_remedy(masks_repository: Path, qwen3: Path) -> None:
    block = {"quant_method": "heapr", "base_model": {"name_or_path": "/gone/away"}}
    with pytest.raises(HeaprError, match='--model-loader-extra-config \'{"base_model": "PATH"}'):
        loaded_from(masks_repository, block)
    assert loaded_from(masks_repository, block, base_model=str(qwen3)) == str(qwen3)


def test_load_format_is_for_masks(masks_repository: Path) -> None:
    for block in ({"quant_method": "heapr", "layout": "compact"}, {"quant_method": "fp8"}, None):
        with pytest.raises(HeaprError, match="is not a masks repository; serve it without --load-format heapr"):
            loaded_from(masks_repository, block)


def test_unknown_keys_are_ignored() -> None:
    assert HeaprConfig.from_config({"new_in_v1_1": 1, "base_model": {"also_new": 2}}).pruning.layout == "masks"


def test_draft_layers_are_not_layer_zero(masks_repository: Path) -> None:
    config = HeaprConfig.from_config({})
    config.maybe_update_config(str(masks_repository), SimpleNamespace(num_hidden_layers=3))
    assert config.is_draft_layer("mtp.layers.0.mlp.experts") and config.is_draft_layer("model.layers.3.mlp.experts")
    assert not config.is_draft_layer("model.layers.0.mlp.experts")


def test_layers_that_vllm_renames(masks_repository: Path) -> None:
    config = HeaprConfig.from_config({})
    config.maybe_update_config(str(masks_repository), SimpleNamespace(num_hidden_layers=4))
    for prefix in ("model.layers.1.mlp.experts", "language_model.model.layers.1.block_sparse_moe.experts"):
        assert config.name_in_masks(prefix) == "model.layers.1.mlp.experts"
    with pytest.raises(HeaprError, match="they lack model.layers.3.mlp.experts"):
        config.name_in_masks("model.layers.3.mlp.experts")


def test_vision_language_wrappers(tmp_path: Path) -> None:
    """vLLM's wrappers share one renaming of the language model, which their checkpoints call model.language_model."""
    from vllm.model_executor.models.paligemma import PaliGemmaForConditionalGeneration  # needs no torchvision

    names = [f"model.language_model.layers.{layer}.mlp.experts" for layer in range(2)]
    NeuronMasks({name: torch.rand(2, 8) < 0.5 for name in names}).save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    config = HeaprConfig.from_config({})
    config.maybe_update_config(str(tmp_path), SimpleNamespace(text_config=SimpleNamespace(num_hidden_layers=2)))
    renamed = PaliGemmaForConditionalGeneration.hf_to_vllm_mapper.apply_list(names)
    assert not set(renamed) & set(names)
    assert all(config.name_in_masks(new) == name for name, new in zip(names, renamed, strict=True))
    assert config.is_draft_layer("mtp.layers.0.mlp.experts") and not config.is_draft_layer(renamed[0])


def test_other_layers_stay_unquantized() -> None:
    linear = ReplicatedLinear.__new__(ReplicatedLinear)
    assert isinstance(
        HeaprConfig().get_quant_method(linear, "model.layers.0.self_attn.o_proj"), UnquantizedLinearMethod
    )
