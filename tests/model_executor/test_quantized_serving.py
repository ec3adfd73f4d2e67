# SPDX-License-Identifier: Apache-2.0
"""Experts in 8 and 4 bits, served: what stock vLLM computes with the values of the codes, in fp32."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from heapr_vllm.formats.checkpoint import INDEX_FILE
from heapr_vllm.model_executor.kernels.cpu_compiled import build
from heapr_vllm.prune import export_checkpoint
from tests import quantized_models
from tests.conftest import prune
from tests.model_executor import engine
from tools import families

pytestmark = pytest.mark.vllm
FP8, INT8, GPTQ = "deepseek_v3+fp8-block", "qwen3_moe+int8", "qwen3_moe+gptq"
FAST = (FP8, INT8, "qwen3_moe+int8-channel", GPTQ, "deepseek_v3+awq")
RANKS = ("qwen3_moe+fp8-block", *FAST[1:])
SLOW = [
    *(pytest.param(mode, RANKS, id=mode) for mode in ("TP=2", "EP=2", "compile")),
    *(pytest.param(mode, [n for n in families.QUANTIZED if n not in FAST], id=mode) for mode in ("compact", "masks")),
]
ROUNDING = 1 / 8  # of prompt logprobs, by activations in 8 bits: two steps of bfloat16 from 8 to 16
EAGER = {"compilation_config": families.CUSTOM_OPS}

Prepare = Callable[[str], Path]


@pytest.fixture(scope="module")
def prepared(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Prepare:
    """Finds the folder of a quantized model as `families.prepare` makes it."""
    root = tmp_path_factory.mktemp("quantized")
    return lambda name: families.prepare(name, root, corpus)


@pytest.fixture(scope="module")
def stock(prepared: Prepare) -> dict[str, families.Output]:
    return dict(families.stock([prepared(name) for name in FAST]))


def assert_same(name: str, found: families.Output, stock: dict[str, families.Output]) -> None:
    assert not isinstance(stock[name], str), f"stock vLLM: {stock[name]}"
    assert not isinstance(found, str), found
    assert families.same(name, found, stock[name])


@pytest.mark.parametrize("mode", ["compact", "masks"])
@pytest.mark.parametrize("name", FAST)
def test_output_equals_stock(mode: str, name: str, prepared: Prepare, stock: dict[str, families.Output]) -> None:
    """After a reload too: codes, scales and what is rounded while loading come again and are packed from anew."""
    folder, arguments = prepared(name) / families.MODES[mode].folder, families.MODES[mode].arguments
    steps = ("generate", "reload", "generate")
    for found in engine.results(engine.run(folder, steps=steps, env=families.ENVIRONMENT, **EAGER, **arguments)):
        assert_same(name, found, stock)


@pytest.mark.skipif(not build.has_vnni() or build.isa().endswith("amx"), reason="not the default on this CPU")
def test_activations_in_8_bits(prepared: Prepare) -> None:
    """The default in half precision: near what the same codes give with activations as they are, after a reload too."""
    outputs, used, steps = {}, {}, ("generate", "reload", "generate")
    for kernel in ("", "compiled"):
        process = engine.run(prepared(INT8) / "compact", dtype="bfloat16", steps=steps, env={"HEAPR_KERNEL": kernel})
        first, outputs[kernel] = engine.results(process)
        assert families.distance(first, outputs[kernel]) == 0
        used[kernel] = "kernel compiled_a8" in process.stdout + process.stderr
    assert used == {"": True, "compiled": False}
    assert 0 < families.distance(outputs[""], outputs["compiled"]) < ROUNDING


def test_activations_in_8_bits_on_the_path_of_a_gpu(prepared: Prepare) -> None:
    """Interpreted, in fp16: near what the same codes give with activations as they are, and the same after a reload."""
    environment = {"HEAPR_KERNEL": "triton_a8", "TRITON_INTERPRET": "1"}
    steps = ("generate", "reload", "generate")
    process = engine.run(prepared(INT8) / "compact", dtype="float16", steps=steps, env=environment)
    assert "kernel triton_a8" in process.stdout + process.stderr
    first, again = engine.results(process)
    plain = engine.run(prepared(INT8) / "compact", dtype="float16", env={"HEAPR_KERNEL": "reference"})
    assert 0 < families.distance(first, engine.results(plain)[-1]) < ROUNDING and first == again


def test_real_weights_after_dummy_ones(prepared: Prepare, stock: dict[str, families.Output]) -> None:
    steps = ("load for real", "generate")
    process = engine.run(prepared(FP8) / "compact", **EAGER, load_format="dummy", steps=steps, env=families.ENVIRONMENT)
    assert_same(FP8, engine.results(process)[-1], stock)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["compact", "masks"])
def test_base_in_4_bits_on_the_path_of_a_gpu(mode: str, prepared: Prepare, stock: dict[str, families.Output]) -> None:
    """Gate and up in 4 bits are widened for a kernel that takes one width for all, and no value changes."""
    folder, arguments = prepared(GPTQ) / families.MODES[mode].folder, families.MODES[mode].arguments
    process = engine.run(folder, env={"HEAPR_KERNEL": "triton", "TRITON_INTERPRET": "1"}, **EAGER, **arguments)
    assert "in int8, kernel triton" in process.stdout + process.stderr
    assert_same(GPTQ, engine.results(process)[-1], stock)


@pytest.mark.slow
def test_each_rank_unpacks_its_own_experts(prepared: Prepare, stock: dict[str, families.Output]) -> None:
    arguments, env = families.MODES["masks"].arguments | families.MODES["EP=2"].arguments, families.MODES["EP=2"].env
    process = engine.run(prepared(GPTQ) / "masks", env=families.ENVIRONMENT | env, **EAGER, **arguments)
    assert_same(GPTQ, engine.results(process)[0], stock)


@pytest.mark.slow
@pytest.mark.parametrize(("mode", "names"), SLOW)
def test_other_modes(mode: str, names: list[str], prepared: Prepare) -> None:
    folders = [prepared(name) for name in names]
    expected = dict(families.stock(folders))
    for name, found in families.serve(folders, families.MODES[mode]):
        assert_same(name, found, expected)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in quantized_models.FOUR_BITS if name.endswith("linears")])
@pytest.mark.parametrize("mode", ["compact", "masks"])
def test_attention_of_4_bits_runs_in_the_engines_kernel(mode: str, name: str, prepared: Prepare) -> None:
    """In bf16, since that kernel has no fp32: experts round differently then, from the third digit on."""
    folder, env = prepared(f"qwen3_moe+{name}"), {"HEAPR_KERNEL": "compiled"}
    expected = engine.results(engine.run(folder / "zeroed", dtype="bfloat16", env={"VLLM_PLUGINS": ""}))[0]
    arguments = families.MODES[mode].arguments
    process = engine.run(folder / families.MODES[mode].folder, dtype="bfloat16", env=env, **arguments)
    assert "CPUWNA16LinearKernel" in process.stdout + process.stderr
    assert families.distance(engine.results(process)[0], expected) < ROUNDING


@pytest.mark.parametrize(("mode", "name"), [("compact", "gptq-linears"), ("masks", "w4a16-linears")])
def test_attention_of_4_bits_is_refused_in_fp32(mode: str, name: str, prepared: Prepare) -> None:
    """Experts of 4 bits are not: `test_output_equals_stock`."""
    arguments = families.MODES[mode].arguments
    process = engine.run(prepared(f"qwen3_moe+{name}") / families.MODES[mode].folder, **arguments)
    message = "qkv_proj has weights of 4 bits, which vLLM does not run in float32; pass --dtype bfloat16"
    assert process.returncode and message in process.stderr


def test_masks_of_the_unquantized_model_serve_its_sibling(prepared: Prepare, corpus: Path, tmp_path: Path) -> None:
    """One calibration for all: the router is the same, so is the fingerprint."""
    plain, sibling = prepared(FAST[2]) / "plain", prepared(FAST[2]) / "base"
    prune(plain, corpus, tmp_path, sparsity=0.5)
    oracle = quantized_models.dequantized(sibling, tmp_path / "values")
    export_checkpoint(tmp_path / "masks", tmp_path / "zeroed", layout="zeroed", model=str(oracle))
    expected = engine.results(engine.run(tmp_path / "zeroed", env={"VLLM_PLUGINS": ""}))[0]
    extra = {"load_format": "heapr", "model_loader_extra_config": {"base_model": str(sibling)}}
    process = engine.run(tmp_path / "masks", **extra)
    assert "in int8" in process.stdout + process.stderr
    assert families.same(FAST[2], engine.results(process)[0], expected)
    override = {"quantization_config": {"quant_method": "heapr", "masks": str(tmp_path / "masks")}}
    process = engine.run(sibling, hf_overrides=override)
    assert families.same(FAST[2], engine.results(process)[0], expected)


def test_damage_is_refused(prepared: Prepare, tmp_path: Path) -> None:
    """The other kinds: tests/model_executor/storage/test_quantized.py."""
    shutil.copytree(prepared(INT8) / "compact", tmp_path / "damaged")
    weights = tmp_path / "damaged" / "model.safetensors"
    tensors = load_file(weights)
    del tensors["model.layers.1.mlp.experts.5.up_proj.weight_scale"]
    save_file(tensors, weights, metadata={"format": "pt"})
    (tmp_path / "damaged" / INDEX_FILE).unlink()
    process = engine.run(tmp_path / "damaged")
    message = "lacks 1 expert tensors, first w3_scale of model.layers.1.mlp.experts.5; export or download it again"
    assert process.returncode and message in process.stderr


def test_other_codes_than_the_bases_are_refused(prepared: Prepare, tmp_path: Path) -> None:
    """INT8 is asked for, and the base model has FP8."""
    shutil.copytree(prepared(FP8) / "masks", tmp_path / "masks")
    config = json.loads((tmp_path / "masks" / "config.json").read_text())
    compact = json.loads((prepared(INT8) / "compact" / "config.json").read_text())
    config["quantization_config"]["experts"] = compact["quantization_config"]["experts"]
    (tmp_path / "masks" / "config.json").write_text(json.dumps(config))
    process = engine.run(tmp_path / "masks", load_format="heapr")
    assert process.returncode and "heapr export --quantize int8" in process.stderr
