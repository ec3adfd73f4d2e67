# SPDX-License-Identifier: Apache-2.0
"""One forward and one backward pass over calibration text: model in, neuron moments out."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tqdm import tqdm
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from heapr_vllm.atomic import atomic_file, check_output
from heapr_vllm.checkpoint import TOKENIZER_FILES, Checkpoint
from heapr_vllm.environment import versions
from heapr_vllm.errors import HeaprError, first_line
from heapr_vllm.prune.collector import MomentCollector
from heapr_vllm.prune.data import checkpoint_blocks, fingerprint
from heapr_vllm.prune.moments import CALIBRATION_FILE, NeuronMoments

PARTIAL_FILE = "partial.safetensors"


@dataclass(frozen=True)
class CalibrationSettings:
    """What the result depends on; `--resume` insists that it has not changed."""

    model: str
    dataset: str
    num_calibration_samples: int = 128
    max_seq_length: int = 2048
    batch_size: int = 1
    seed: int = 0
    dtype: str = "auto"
    revision: str | None = None


def collect_moments(model: PreTrainedModel, blocks: torch.Tensor, batch_size: int = 1, *,
                    collector: MomentCollector | None = None, first: int = 0,
                    after_batch: Callable[[int], None] | None = None) -> NeuronMoments:
    """Runs `model` over token `blocks` int64 [N, L] and returns the moments; weights get no gradient.

    The loss is the sum of next-token cross entropies, so the result does not depend on `batch_size`. `collector` and
    `first` continue an interrupted run; `after_batch(n)` is called when n samples are done. Raises HeaprError if the
    loss is not finite.
    """
    collector = collector or MomentCollector(model)
    with collector.attached(), _backward_only_to_activations(model):
        for start in range(first, len(blocks), batch_size):
            ids = blocks[start : start + batch_size].to(model.device)
            logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
            loss = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum")
            if not loss.isfinite():
                raise HeaprError(f"the loss is {loss.item()} at sample {start}; try --dtype float32, "
                                 "or check the checkpoint for NaN weights")
            loss.backward()
            if after_batch is not None:
                after_batch(start + len(ids))
    return collector.moments({"num_calibration_samples": len(blocks), "max_seq_length": blocks.shape[1]})


@contextmanager
def _backward_only_to_activations(model: PreTrainedModel):
    """No weight gradients, evaluation mode, gradient checkpointing on; everything is put back on exit."""
    training = {module: module.training for module in model.modules()}
    requires_grad = {parameter: parameter.requires_grad for parameter in model.parameters()}
    model.eval().requires_grad_(False)
    hook = model.get_input_embeddings().register_forward_hook(lambda _, __, output: output.requires_grad_(True))
    model.gradient_checkpointing_enable({"use_reentrant": False})
    for module in model.modules():  # checkpointing is active in training mode only; dropout inside stays off
        if isinstance(module, GradientCheckpointingLayer):
            module.training = True
    try:
        yield
    finally:
        hook.remove()
        model.gradient_checkpointing_disable()
        for module, mode in training.items():
            module.training = mode
        for parameter, flag in requires_grad.items():
            parameter.requires_grad_(flag)


def calibrate(settings: CalibrationSettings, output: Path, *, device: str = "cpu", checkpoint_every: int = 8,
              resume: bool = False, overwrite: bool = False) -> NeuronMoments:
    """`heapr calibrate`: writes `moments.safetensors`, `calibration.json` and the model's config and tokenizer.

    Every `checkpoint_every` batches the sums are saved; with `resume` a killed run continues from there and ends in the
    same bytes. Raises HeaprError on bad input before anything is written, and if the loss becomes NaN on the way.
    """
    if not (resume and (output / PARTIAL_FILE).is_file()):
        check_output(output, overwrite)
    check_device(device)
    checkpoint = Checkpoint.resolve(settings.model, settings.revision)
    checkpoint.check_unquantized()
    shapes = checkpoint.expert_shapes()
    blocks = calibration_blocks(settings, checkpoint)
    identity = {**asdict(settings), "revision": checkpoint.commit or settings.revision,
                "dataset_fingerprint": fingerprint(blocks), "base_fingerprint": checkpoint.fingerprint(),
                "checkpoint_bytes": checkpoint.num_bytes(), "routed_bytes": checkpoint.num_routed_bytes()}
    partial = _load_partial(output, identity) if resume else None
    model = load_model(checkpoint, settings.dtype, device)
    collector = MomentCollector(model)
    if missing := shapes.keys() - collector.sums.keys():
        raise HeaprError(f"{type(model).__name__} does not expose {min(missing)} of the checkpoint; "
                         "this family is not supported")
    first = 0
    if partial is not None:
        collector.restore(partial)
        first = partial.metadata["samples_done"]
    if not resume:
        (output / PARTIAL_FILE).unlink(missing_ok=True)
    output.parent.mkdir(parents=True, exist_ok=True)
    started = time.time()
    batch_tokens = settings.batch_size * settings.max_seq_length
    with tqdm(total=blocks.numel(), initial=first * settings.max_seq_length, unit="tok", unit_scale=True,
              desc="calibrating", disable=None) as bar:

        def after_batch(done: int) -> None:
            bar.update(batch_tokens)
            if done < len(blocks) and done // settings.batch_size % checkpoint_every == 0:
                state = collector.moments({**identity, "samples_done": done})
                state.save(output / PARTIAL_FILE, torch.float64)

        collect_moments(model, blocks, settings.batch_size, collector=collector, first=first, after_batch=after_batch)
    moments = collector.moments(identity)
    _write_provenance(output, checkpoint, identity, moments, blocks, time.time() - started)
    moments.save_pretrained(output)
    (output / PARTIAL_FILE).unlink(missing_ok=True)
    return moments


def plan(settings: CalibrationSettings) -> dict[str, Any]:
    """`--dry-run`: sizes by formula from the config and the shard headers; no weight is loaded."""
    checkpoint = Checkpoint.resolve(settings.model, settings.revision)
    checkpoint.check_unquantized()
    shapes = checkpoint.expert_shapes()
    neurons = sum(experts * width for experts, width in shapes.values())
    text = checkpoint.config.get("text_config", checkpoint.config)
    tokens = settings.batch_size * settings.max_seq_length
    scale = 2 if settings.dtype == "float32" and text.get("dtype", text.get("torch_dtype")) == "bfloat16" else 1
    return {"moe_layers": len(shapes), "experts": sum(experts for experts, _ in shapes.values()), "neurons": neurons,
            "calibration_tokens": settings.num_calibration_samples * settings.max_seq_length,
            "weight_bytes": checkpoint.num_bytes() * scale, "accumulator_bytes": 6 * 8 * neurons,
            "logits_bytes": 2 * 4 * tokens * text["vocab_size"],
            "checkpointed_activation_bytes": 4 * tokens * text["hidden_size"] * text["num_hidden_layers"],
            "output_bytes": 6 * 4 * neurons}


def check_device(device: str) -> None:
    """Raises HeaprError if `device` is a GPU that torch does not see."""
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise HeaprError(f"--device {device}: this torch ({torch.__version__}) sees no GPU; use --device cpu")


def calibration_blocks(settings: CalibrationSettings, checkpoint: Checkpoint) -> torch.Tensor:
    """Token blocks int64 [num_calibration_samples, max_seq_length]. Raises HeaprError if the text is not enough."""
    return checkpoint_blocks(checkpoint, settings.dataset, settings.num_calibration_samples, settings.max_seq_length,
                             settings.seed)


def load_model(checkpoint: Checkpoint, dtype: str, device: str) -> PreTrainedModel:
    """The whole model on `device`. Raises HeaprError if transformers cannot load it."""
    try:
        return AutoModelForCausalLM.from_pretrained(checkpoint.path, dtype=dtype).to(device)
    except ValueError as error:
        raise HeaprError(f"transformers cannot load {checkpoint.path}: {first_line(error)}") from error


def _load_partial(output: Path, identity: dict[str, Any]) -> NeuronMoments | None:
    """The last saved state, or None if there is none yet. Raises HeaprError if it belongs to other settings."""
    if not (output / PARTIAL_FILE).is_file():
        return None
    partial = NeuronMoments.load(output / PARTIAL_FILE)
    changed = sorted(key for key in identity if partial.metadata.get(key) != identity[key])
    if changed:
        raise HeaprError(f"{output} was started with another {', '.join(changed)}; repeat the original command with "
                         "--resume, or start anew with --overwrite")
    return partial


def _write_provenance(output: Path, checkpoint: Checkpoint, identity: dict[str, Any], moments: NeuronMoments,
                      blocks: torch.Tensor, seconds: float) -> None:
    record = {**identity, "calibration_tokens": blocks.numel(), "wall_time_seconds": round(seconds, 1),
              "versions": versions(), "tokens": {prefix: count.tolist() for prefix, count in moments.tokens.items()}}
    output.mkdir(exist_ok=True)
    atomic_file(output / CALIBRATION_FILE, lambda path: path.write_text(json.dumps(record, indent=2) + "\n"))
    for name in ("config.json", *TOKENIZER_FILES):
        if (checkpoint.path / name).is_file():
            content = (checkpoint.path / name).read_bytes()
            atomic_file(output / name, lambda path, content=content: path.write_bytes(content))
