# SPDX-License-Identifier: Apache-2.0
"""`heapr export --layout plain`: any engine loads it, and it computes what the zeroed checkpoint does."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from heapr_vllm.cli.main import main
from heapr_vllm.errors import HeaprError
from heapr_vllm.formats.checkpoint import Checkpoint
from heapr_vllm.prune import CalibrationSettings, export_checkpoint
from heapr_vllm.prune.calibration.calibrate import calibrate
from heapr_vllm.prune.export.plain_config import plain_config
from heapr_vllm.prune.models.deepseek import register_deepseek_model
from tests import tiny_models

WIDTH_FIELDS = {
    "qwen3_moe": {"moe_intermediate_size": 32},
    "qwen2_moe": {"moe_intermediate_size": 32},
    "dense_between": {"moe_intermediate_size": 32},
    "mixtral": {"intermediate_size": 32},
    "olmoe": {"intermediate_size": 32},
    "deepseek_v2": {"moe_intermediate_size": 32, "n_shared_experts": 2},
    "glm4_moe": {"moe_intermediate_size": 32, "n_shared_experts": 2},
    "deepseek": {"moe_intermediate_size": 32, "n_shared_experts": 4},
}
UNIFORM = ("--scope", "uniform", "--width-multiple", "32")
ROTARY_IN_TORCH = {"custom_ops": ["-rotary_embedding"]}


def pruned(base: Path, corpus: Path, folder: Path, *options: str) -> Path:
    """Masks repository of `base`, half of whose neurons go."""
    settings = CalibrationSettings(
        model=str(base), dataset=str(corpus), num_calibration_samples=4, max_seq_length=64, dtype="float32"
    )
    calibrate(settings, folder / "calib")
    command = ["prune", str(folder / "calib"), "--sparsity", "0.5", "--protect", "0", *options]
    assert main([*command, "-o", str(folder / "masks")]) == 0
    return folder / "masks"


@pytest.mark.parametrize("family", WIDTH_FIELDS)
def test_transformers_loads_it(family: str, corpus: Path, tmp_path: Path) -> None:
    register_deepseek_model()
    base = tiny_models.save(family, tmp_path / "base")
    masks = pruned(base, corpus, tmp_path, "--scope", "uniform")
    for layout in ("plain", "zeroed"):
        assert main(["export", str(masks), "--layout", layout, "-o", str(tmp_path / layout)]) == 0
    before, after = (json.loads((path / "config.json").read_text()) for path in (base, tmp_path / "plain"))
    assert {key: value for key, value in after.items() if before.get(key) != value} == WIDTH_FIELDS[family]
    plain, zeroed = (
        AutoModelForCausalLM.from_pretrained(tmp_path / layout, dtype=torch.float32, output_loading_info=True)
        for layout in ("plain", "zeroed")
    )
    assert not plain[1]["missing_keys"] and not plain[1]["unexpected_keys"] and not plain[1]["mismatched_keys"]
    ids = torch.arange(60)[None]
    torch.testing.assert_close(plain[0](ids).logits, zeroed[0](ids).logits, rtol=0, atol=1e-4)
    sizes = [
        sum(tensor.nbytes for tensor in load_file(path / "model.safetensors").values())
        for path in (base, tmp_path / "plain")
    ]
    assert sizes[1] < sizes[0]


@pytest.mark.vllm
def test_stock_vllm_serves_it(corpus: Path, qwen3: Path, tmp_path: Path) -> None:
    pytest.importorskip("vllm")
    from tests.model_executor import engine

    masks = pruned(qwen3, corpus, tmp_path, *UNIFORM)
    found = {}
    for layout in ("plain", "zeroed"):
        export_checkpoint(masks, tmp_path / layout, layout=layout)
        (found[layout],) = engine.results(engine.run(tmp_path / layout, env={"VLLM_PLUGINS": ""}))
    assert found["plain"]["ids"] == found["zeroed"]["ids"]
    for logprobs, wanted in zip(found["plain"]["logprobs"], found["zeroed"]["logprobs"], strict=True):
        assert logprobs == pytest.approx(wanted, abs=1e-4)


@pytest.mark.slow
@pytest.mark.vllm
def test_stock_vllm_serves_every_family_it_knows(corpus: Path, tmp_path: Path) -> None:
    """As `tools.families` runs them: the CPU's MLA is half precision only, its rotary op misreads DeepSeek."""
    pytest.importorskip("vllm")
    from tests.model_executor import engine

    families = WIDTH_FIELDS.keys() - {"deepseek"}  # whose config neither transformers nor vLLM has
    folders = []
    for family in families:
        masks = pruned(tiny_models.save(family, tmp_path / family / "base"), corpus, tmp_path / family, *UNIFORM)
        for layout in ("plain", "zeroed"):
            folders.append(tmp_path / family / layout)
            export_checkpoint(masks, folders[-1], layout=layout)
    arguments = {"max_model_len": 128, "enforce_eager": True, "compilation_config": ROTARY_IN_TORCH}
    env = {"VLLM_PLUGINS": "", "VLLM_MLA_DISABLE": "1"}
    found = list(engine.generate_many(folders, env=env, dtype="float32", **arguments))
    for family, plain, zeroed in zip(families, found[::2], found[1::2], strict=True):
        assert isinstance(plain, dict), f"{family}: {plain}"
        assert plain["ids"] == zeroed["ids"], family
        for logprobs, wanted in zip(plain["logprobs"], zeroed["logprobs"], strict=True):
            assert logprobs == pytest.approx(wanted, abs=1e-4), family


def test_inspect_says_what_the_common_width_costs(
    corpus: Path, qwen3: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    masks = pruned(qwen3, corpus, tmp_path, "--scope", "uniform")
    assert "the same with a width of its own for every expert: 0." in capsys.readouterr().out
    frontier = json.loads((masks / "heapr" / "frontier.json").read_text())
    assert 0 < frontier["own_widths"]["loss_increase"] < frontier["chosen"]["loss_increase"]
    assert frontier["own_widths"]["stored_reduction"] == frontier["chosen"]["stored_reduction"] == 0.5


def test_widths_that_differ_are_refused(masks_repository: Path, tmp_path: Path) -> None:
    with pytest.raises(HeaprError, match="experts keep 0 to 64 neurons, .* prune with --scope uniform"):
        export_checkpoint(masks_repository, tmp_path / "out", layout="plain")


def test_shared_experts_that_follow_the_width(corpus: Path, tmp_path: Path) -> None:
    """48 of 64 neurons are no divisor of what the shared expert has."""
    base = Checkpoint(tiny_models.save("glm4_moe", tmp_path / "base"))
    with pytest.raises(HeaprError, match="no field in the config.json of glm4_moe .* 48 neurons wide"):
        plain_config(base, 48)


def test_draft_layers_are_refused(tmp_path: Path) -> None:
    base = Checkpoint(tiny_models.save("deepseek_v3", tmp_path / "base"))
    with pytest.raises(HeaprError, match="multi-token prediction, whose experts stay whole"):
        plain_config(base, 32)


def test_experts_in_8_bits_are_refused(corpus: Path, qwen3: Path, tmp_path: Path) -> None:
    masks = pruned(qwen3, corpus, tmp_path, "--scope", "uniform")
    with pytest.raises(
        HeaprError, match="plain checkpoints cannot be written with --quantize int8; use --layout compact"
    ):
        export_checkpoint(masks, tmp_path / "out", layout="plain", quantize="int8")


def test_one_width_per_layer_stays_compact(corpus: Path, qwen3: Path, tmp_path: Path, capsys) -> None:
    """No family that we prune reads a width per layer from transformers' `per_layer_config`."""
    masks = pruned(qwen3, corpus, tmp_path, "--scope", "layer-uniform", "--width-multiple", "8")
    export_checkpoint(masks, tmp_path / "compact")
    tensors = load_file(tmp_path / "compact" / "model.safetensors")
    widths = {name.split(".")[2]: len(tensor) for name, tensor in tensors.items() if name.endswith("gate_proj.weight")}
    for name, tensor in tensors.items():
        assert not name.endswith("gate_proj.weight") or len(tensor) == widths[name.split(".")[2]]
