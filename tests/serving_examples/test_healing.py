# SPDX-License-Identifier: Apache-2.0
"""Healing on tiny random models: what is trained, what stays, what is written, and what a kill costs."""

import sys
import weakref
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState

from heapr_vllm.formats.checkpoint import Checkpoint
from heapr_vllm.formats.masks import NeuronMasks
from heapr_vllm.prune import export_checkpoint
from heapr_vllm.prune.models.experts import expert_modules
from heapr_vllm.prune.models.loading import load_model
from heapr_vllm.prune.models.module_weights import empty_model
from heapr_vllm.prune.models.pruned import opened
from heapr_vllm.prune.text.samples import draw_samples
from serving_examples.heal import main
from serving_examples.healing import heal as healing
from serving_examples.healing import teacher
from serving_examples.healing.distillation import Lesson
from serving_examples.healing.heal import heal
from serving_examples.healing.memory import MemoryPlan
from serving_examples.healing.settings import HealingSettings
from serving_examples.healing.student import AdapterStudent
from tests.model_executor.engine import PROMPTS


@pytest.fixture(scope="module")
def settings(corpus: Path) -> HealingSettings:
    """12 steps of 4 samples."""
    return HealingSettings(dataset=str(corpus), num_samples=52, max_seq_length=32, dtype="float32", learning_rate=5e-3)


@pytest.fixture(scope="module")
def healed_weights(settings: HealingSettings, masks_repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A full-size checkpoint that was healed from masks."""
    output = tmp_path_factory.mktemp("healed") / "weights"
    record = heal(masks_repository, output, replace(settings, into="weights"))
    assert record.kl_after < 0.9 * record.kl_before
    return output


def logits(checkpoint: Path) -> torch.Tensor:
    """Of a prompt, in float32, [L, V]."""
    with opened(Checkpoint(checkpoint), "float32", "cpu") as (model, _), torch.no_grad():
        return model(torch.tensor(PROMPTS[1:2])).logits[0]


def test_adapter_heals_and_says_what_it_needs_first(
    settings: HealingSettings, masks_repository: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    record = heal(masks_repository, tmp_path / "adapter", settings)
    assert record.kl_after < 0.9 * record.kl_before and record.tokens == 12 * 4 * 32
    assert capsys.readouterr().out.startswith("memory: about ")
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert sum(tensor.numel() for tensor in tensors.values()) == record.trained
    assert {name.split(".")[-3] for name in tensors} == {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert {entry.name for entry in tmp_path.iterdir()} == {"adapter"}


def test_one_model_at_a_time(
    settings: HealingSettings, masks_repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dense: list[weakref.ref] = []

    def load(*arguments: Any) -> PreTrainedModel:
        model = load_model(*arguments)
        dense.append(weakref.ref(model))
        return model

    def opened_alone(*arguments: Any) -> Any:
        assert [model() for model in dense] == [None]
        return opened(*arguments)

    monkeypatch.setattr(teacher, "load_model", load)
    monkeypatch.setattr(healing, "opened", opened_alone)
    heal(masks_repository, tmp_path / "adapter", replace(settings, num_samples=8))


def test_gradient_checkpointing_changes_nothing(
    settings: HealingSettings, masks_repository: Path, tmp_path: Path
) -> None:
    plain, again = (
        heal(masks_repository, tmp_path / str(on), replace(settings, gradient_checkpointing=on)) for on in (False, True)
    )
    assert again.kl_after == pytest.approx(plain.kl_after, rel=1e-4) and again.kl_before == plain.kl_before


def test_pruned_neurons_stay_exactly_zero(healed_weights: Path, awkward_masks: NeuronMasks, qwen3: Path) -> None:
    before = expert_modules(load_model(Checkpoint(qwen3), "float32", "cpu"))
    after = expert_modules(load_model(Checkpoint(healed_weights), "float32", "cpu"))
    for prefix, keep in awkward_masks.keep.items():
        columns = after[prefix].down_proj.mT
        assert not columns[~keep].any() and not after[prefix].gate_up_proj[torch.cat([~keep, ~keep], 1)].any()
        assert (columns[keep] != before[prefix].down_proj.mT[keep]).any(1).float().mean() > 0.9


def test_exported_weights_compute_the_same(healed_weights: Path, masks_repository: Path, tmp_path: Path) -> None:
    export_checkpoint(masks_repository, tmp_path / "compact", model=str(healed_weights), verify=False)
    torch.testing.assert_close(logits(tmp_path / "compact"), logits(healed_weights), rtol=0, atol=1e-5)
    assert (logits(masks_repository) - logits(healed_weights)).abs().max() > 0.1


def test_a_compact_checkpoint_is_healed_from_what_it_holds(
    settings: HealingSettings, masks_repository: Path, tmp_path: Path
) -> None:
    """Its down_proj, which a repair may have changed, is written even if something else was trained."""
    compact = changed_compact(masks_repository, tmp_path / "compact")
    heal(compact, tmp_path / "healed", replace(settings, into="weights", parts=("routers",), learning_rate=1e-9))
    torch.testing.assert_close(logits(tmp_path / "healed"), logits(compact), rtol=0, atol=1e-4)
    assert (logits(masks_repository) - logits(compact)).abs().max() > 0.1


def changed_compact(masks_repository: Path, output: Path) -> Path:
    """A compact checkpoint with another down_proj than the base model's."""
    export_checkpoint(masks_repository, output)
    for shard in output.glob("*.safetensors"):
        tensors = load_file(shard)
        changed = {name: tensor * (1.5 if "down_proj" in name else 1) for name, tensor in tensors.items()}
        save_file(changed, shard, metadata={"format": "pt"})
    return output


class Killed(Exception):
    """Stands for a kill."""


class KillAt(TrainerCallback):
    """Raises Killed after a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **others: Any) -> None:
        if state.global_step == self.step:
            raise Killed


@pytest.mark.parametrize("into", ["adapter", "weights"])
def test_resume(
    into: str, settings: HealingSettings, masks_repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = replace(settings, into=into)
    heal(masks_repository, tmp_path / "whole", settings)
    torch.manual_seed(5)  # another state of the generator does not matter
    with pytest.raises(Killed):
        heal(masks_repository, tmp_path / "killed", settings, callbacks=[KillAt(7)])
    assert not (tmp_path / "killed").exists()
    monkeypatch.setattr(teacher, "load_model", None)  # the dense model is not asked again
    monkeypatch.setattr(Lesson, "divergence", counted := Counted(Lesson.divergence))
    heal(masks_repository, tmp_path / "killed", settings)
    measured_on, trained_after_the_save = 2 * 1, 12 - 6
    assert counted.calls == measured_on + trained_after_the_save
    assert weights(tmp_path / "killed").keys() == weights(tmp_path / "whole").keys()
    for name, tensor in weights(tmp_path / "whole").items():
        assert torch.equal(weights(tmp_path / "killed")[name], tensor), name


class Counted:
    """A function that counts its calls."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function, self.calls = function, 0

    def __get__(self, instance: Any, owner: type) -> Callable[..., Any]:
        return partial(self, instance)

    def __call__(self, *arguments: Any) -> Any:
        self.calls += 1
        return self.function(*arguments)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    (file,) = folder.glob("*.safetensors")
    return load_file(file)


def test_memory_counts_what_is_there(settings: HealingSettings, qwen3: Path, corpus: Path) -> None:
    checkpoint = Checkpoint(qwen3)
    model, empty = load_model(checkpoint, "float32", "cpu"), empty_model(checkpoint, "float32")
    samples = draw_samples(checkpoint, settings, 8)
    plans = [MemoryPlan.of(each, AdapterStudent.of(each, settings).model, samples, settings) for each in (model, empty)]
    adapter = 3 * 16 * 4 * (64 + 64)  # layers, rank, projections, inputs and outputs
    assert plans[0] == plans[1] and plans[0].training_state == 12 * adapter
    assert plans[0].weights == sum(parameter.nbytes for parameter in model.parameters())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{base}", "-o", "{work}/out"], "is not pruned; name what `heapr prune` or `heapr export` wrote"),
        (["{masks}", "-o", "{work}"], "already exists; remove it, or choose another --output"),
        (["{masks}", "-o", "{work}/out", "--into", "weights", "--dtype", "bfloat16"], "add --dtype float32"),
        (["{masks}", "-o", "{work}/out", "--target-modules", "qkv"], "name its attention's with --target-modules"),
        (["{masks}", "-o", "{work}/out", "--num-samples", "4"], "give more text with --num-samples"),
        (["{masks}", "-o", "{work}/out", "--device", "cuda:1"], "choose a GPU with CUDA_VISIBLE_DEVICES"),
    ],
)
def test_mistakes(
    arguments: list[str],
    message: str,
    qwen3: Path,
    masks_repository: Path,
    corpus: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    places = {"base": qwen3, "masks": masks_repository, "work": tmp_path}
    filled = [argument.format(**places) for argument in arguments]
    text = ["--dataset", str(corpus), "--max-seq-length", "32", "--num-samples", "52"]
    monkeypatch.setattr(sys, "argv", ["heal", *text, "--epochs", "1", *filled])
    assert main() == 2
    error = capsys.readouterr().err
    assert error.startswith("heal: error: ") and message in error and error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
