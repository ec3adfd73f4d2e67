# SPDX-License-Identifier: Apache-2.0
"""The plugin against stock vLLM on the same weights with the pruned neurons zeroed, in fp32."""

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from heapr_vllm.cli.main import main
from heapr_vllm.formats.evaluation_record import EvaluationRecord
from heapr_vllm.formats.masks import NeuronMasks
from heapr_vllm.prune import CalibrationSettings, NeuronMoments, export_checkpoint, write_masks_repository
from heapr_vllm.prune.calibration.calibrate import calibrate
from heapr_vllm.prune.repair.fit import RepairSettings
from tests import tiny_models
from tests.conftest import awkward
from tests.evaluation.local_tasks import write_task
from tests.model_executor import engine

pytestmark = pytest.mark.vllm
RAGGED = {"HEAPR_CPU_KERNEL": "ragged"}  # our op, where it compiles
BUCKETS = {"HEAPR_CPU_KERNEL": "native", "HEAPR_CPU_BUCKETS": "always"}  # by itself it pads layers as small as these
UNIFORM = {"HEAPR_CPU_KERNEL": "native", "HEAPR_CPU_BUCKETS": "never"}
TWO_RANKS = RAGGED | engine.TWO_RANKS


@pytest.fixture(scope="module")
def compact(masks_repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("compact") / "compact"
    export_checkpoint(masks_repository, output)
    return output


@pytest.fixture(scope="module")
def stock(masks_repository: Path, tmp_path_factory: pytest.TempPathFactory) -> dict:
    """Stock vLLM on the zeroed checkpoint."""
    output = tmp_path_factory.mktemp("zeroed") / "zeroed"
    export_checkpoint(masks_repository, output, layout="zeroed")
    return engine.results(engine.run(output, env={"VLLM_PLUGINS": ""}))[0]


def assert_same(found: dict, expected: dict) -> None:
    assert found["ids"] == expected["ids"]
    for logprobs, wanted in zip(found["logprobs"], expected["logprobs"], strict=True):
        assert max(abs(a - b) for a, b in zip(logprobs, wanted, strict=True)) < 1e-4


def override(masks_repository: Path) -> dict:
    return {"quantization_config": {"quant_method": "heapr", "masks": str(masks_repository)}}


@pytest.mark.parametrize("storage", [RAGGED, BUCKETS, UNIFORM], ids=["ragged", "buckets", "uniform"])
def test_compact_also_after_reload(storage: dict, compact: Path, stock: dict) -> None:
    found = engine.results(engine.run(compact, steps=("generate", "reload", "generate"), env=storage))
    assert_same(found[0], stock)
    assert_same(found[1], stock)


@pytest.mark.filterwarnings("ignore:.*experts to repair see fewer tokens")
def test_repaired_checkpoint(masks_repository: Path, tmp_path: Path) -> None:
    """Refitted weights are served like any others."""
    for layout in ("compact", "zeroed"):
        export_checkpoint(masks_repository, tmp_path / layout, layout=layout, repair=RepairSettings())
    expected = engine.results(engine.run(tmp_path / "zeroed", env={"VLLM_PLUGINS": ""}))[0]
    assert_same(engine.results(engine.run(tmp_path / "compact", env=RAGGED))[0], expected)


def answered(samples: Path) -> list[str]:
    """Answers without an unfinished character at the end, which only transformers shows."""
    return [json.loads(line)["resps"][0][0].rstrip("\ufffd") for line in samples.read_text().splitlines()]


@pytest.mark.slow
def test_evaluation_of_what_is_served_equals_that_of_transformers(
    compact: Path, masks_repository: Path, qwen3: Path, corpus: Path, tmp_path: Path
) -> None:
    prompts = ["abc def", "gaf bca", "hhd", "ca fe ba", "bc", "e hd ab"]
    write_task(tmp_path / "tasks", "own", [{"prompt": prompt, "answer": "a"} for prompt in prompts])
    rows = {}
    answers = {}
    for backend in ("transformers", "vllm"):
        output = tmp_path / f"{backend}.json"
        models = [str(compact), str(masks_repository), "--baseline", str(qwen3)]
        text = ["--dataset", str(corpus), "--num-samples", "4", "--max-seq-length", "64", "--top-k", "320"]
        tasks = ["--tasks", "own", "--include-path", str(tmp_path / "tasks"), "--samples", str(tmp_path / backend)]
        how = ["--dtype", "float32", "--backend", backend, "-o", str(output)]
        assert main(["eval", *models, *text, *tasks, *how]) == 0
        rows[backend] = EvaluationRecord.read(output).models
        files = sorted((tmp_path / backend).rglob("own.jsonl"))
        answers[backend] = [answered(path) for path in files]
    assert answers["transformers"] == answers["vllm"] and len(answers["vllm"]) == 3
    for one, other in zip(rows["transformers"], rows["vllm"], strict=True):
        assert one.perplexity == pytest.approx(other.perplexity, rel=1e-4)
        assert one.stored_reduction == other.stored_reduction and one.tasks == other.tasks
    for one, other in zip(rows["transformers"][1:], rows["vllm"][1:], strict=True):
        assert one.agreement.kl_divergence == pytest.approx(other.agreement.kl_divergence, rel=1e-3)
        assert one.agreement.top1 == pytest.approx(other.agreement.top1, abs=0.01)


def test_masks_repository_also_after_reload(masks_repository: Path, stock: dict) -> None:
    found = engine.results(
        engine.run(masks_repository, load_format="heapr", steps=("generate", "reload", "generate"), env=RAGGED)
    )
    assert_same(found[0], stock)
    assert_same(found[1], stock)


def test_masks_over_an_untouched_base(masks_repository: Path, qwen3: Path, stock: dict) -> None:
    assert_same(engine.results(engine.run(qwen3, hf_overrides=override(masks_repository), env=RAGGED))[0], stock)


def test_torch_compile_compact(compact: Path, stock: dict) -> None:
    assert_same(engine.results(engine.run(compact, enforce_eager=False, env=RAGGED))[0], stock)


def test_torch_compile_masks(masks_repository: Path, stock: dict) -> None:
    process = engine.run(masks_repository, enforce_eager=False, load_format="heapr", env=UNIFORM)
    assert_same(engine.results(process)[0], stock)


def test_tensor_parallel(compact: Path, stock: dict) -> None:
    assert_same(engine.results(engine.run(compact, tensor_parallel_size=2, env=TWO_RANKS))[0], stock)


def test_expert_parallel_masks(masks_repository: Path, stock: dict) -> None:
    process = engine.run(
        masks_repository, load_format="heapr", tensor_parallel_size=2, enable_expert_parallel=True, env=TWO_RANKS
    )
    assert_same(engine.results(process)[0], stock)


def test_shared_experts(corpus: Path, tmp_path: Path) -> None:
    """Qwen2-MoE: shared expert and its gate stay whole."""
    base = tiny_models.save("qwen2_moe", tmp_path / "base")
    calibrate(
        CalibrationSettings(model=str(base), dataset=str(corpus), num_calibration_samples=4, max_seq_length=64),
        tmp_path / "calib",
    )
    masks = awkward(NeuronMoments.from_pretrained(tmp_path / "calib"))
    write_masks_repository(masks, tmp_path / "calib", tmp_path / "masks")
    export_checkpoint(tmp_path / "masks", tmp_path / "compact")
    export_checkpoint(tmp_path / "masks", tmp_path / "zeroed", layout="zeroed")
    expected = engine.results(engine.run(tmp_path / "zeroed", env={"VLLM_PLUGINS": ""}))[0]
    assert_same(engine.results(engine.run(tmp_path / "compact", env=RAGGED))[0], expected)


def test_dummy_weights_and_memory(compact: Path, awkward_masks: NeuronMasks, stock: dict) -> None:
    """Random weights load, then real ones; experts take the bytes of their kept neurons, rounded to the op's unit."""
    from heapr_vllm.model_executor.kernels import cpu_native
    from heapr_vllm.model_executor.kernels.cpu_compiled import extension, kernel

    steps = ("generate", "expert_tensors", "load for real", "generate")
    process = engine.run(
        compact,
        load_format="dummy",
        steps=steps,
        env=RAGGED | {"HEAPR_CPU_BUCKETS": "always", "VLLM_ALLOW_INSECURE_SERIALIZATION": "1"},
    )
    _, tensors, found = engine.results(process)
    assert_same(found, stock)
    unit = kernel.WIDTH_UNIT if extension.load() else cpu_native.WIDTH_UNIT
    rows = sum(-(-width // unit) * unit for widths in awkward_masks.widths.values() for width in widths.tolist())
    dense_rows = 3 * 8 * 64
    assert tensors["parameter_bytes"] == rows * 3 * 64 * 4 < dense_rows * 3 * 64 * 4
    assert tensors["tables_in_state_dict"] == 0, "reload and sharded savers would take them for weights"
    assert tensors["tables_in_buffers"] == 2 * 3, "sleep level 2 keeps buffers only"


def corrupted(source: Path, target: Path, edit) -> Path:
    """Copy of a checkpoint whose tensors `edit` changed."""
    shutil.copytree(source, target)
    tensors = load_file(target / "model.safetensors")
    edit(tensors)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    index = json.loads((target / "model.safetensors.index.json").read_text())
    index["weight_map"] = dict.fromkeys(tensors, "model.safetensors")
    (target / "model.safetensors.index.json").write_text(json.dumps(index))
    return target


def refused(model: Path, message: str, **arguments) -> None:
    """One test for every place that refuses: the front end, a worker's model, its weights. The rest are unit tests."""
    process = engine.run(model, **arguments)
    assert process.returncode != 0, "the engine started"
    assert message in process.stdout + process.stderr, (process.stdout + process.stderr)[-3000:]


def test_missing_expert_tensor(compact: Path, tmp_path: Path) -> None:
    name = "model.layers.1.mlp.experts.4.down_proj.weight"
    broken = corrupted(compact, tmp_path / "broken", lambda tensors: tensors.pop(name))
    message = "the checkpoint lacks 1 expert tensors, first w2 of model.layers.1.mlp.experts.4; export"
    refused(broken, message)
    refused(broken, message, load_format="dummy", steps=("load for real",))


def test_missing_weights_beside_the_experts(compact: Path, tmp_path: Path) -> None:
    """As stock vLLM refuses them, and parts of fused weights too, of which stock takes any for the whole."""
    names = ("lm_head.weight", "model.layers.1.self_attn.k_proj.weight", "model.norm.weight")

    def edit(tensors: dict) -> None:
        for name in names:
            del tensors[name]

    broken = corrupted(compact, tmp_path / "broken", edit)
    refused(broken, f"{broken} lacks {names[0]} and {len(names) - 1} more weights; export or download it again")


def test_changed_masks(compact: Path, tmp_path: Path) -> None:
    shutil.copytree(compact, tmp_path / "changed")
    masks = NeuronMasks.from_pretrained(compact)
    masks.keep["model.layers.0.mlp.experts"][5] ^= True
    masks.save_pretrained(tmp_path / "changed")
    refused(tmp_path / "changed", "differs from the masks_sha256 in config.json")


def test_expert_lora(compact: Path) -> None:
    refused(compact, "LoRA on pruned experts is not supported; restrict it to attention", enable_lora=True)
