# SPDX-License-Identifier: Apache-2.0
"""One forward and one backward pass over calibration text: model in, neuron moments out."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tqdm import tqdm
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from heapr_vllm.atomic import atomic_file, check_output
from heapr_vllm.checkpoint import TOKENIZER_FILES, Checkpoint
from heapr_vllm.environment import versions
from heapr_vllm.errors import HeaprError
from heapr_vllm.prune.collector import MomentCollector
from heapr_vllm.prune.data import checkpoint_blocks, fingerprint
from heapr_vllm.prune.loading import check_device, load_model
from heapr_vllm.prune.moments import CALIBRATION_FILE, MOMENTS_FILE, NeuronMoments
from heapr_vllm.prune.parallel import ALONE, Processes
from heapr_vllm.prune.state import PARTIAL_FILE, SavedState


class NotFiniteError(HeaprError):
    """The loss is NaN or infinite: no later step can be right."""


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
    stream: bool = False


def collect_moments(model: PreTrainedModel, blocks: torch.Tensor, batch_size: int = 1, *,
                    collector: MomentCollector | None = None, first: int = 0,
                    after_batch: Callable[[int], None] | None = None) -> NeuronMoments:
    """Runs `model` over token `blocks` int64 [N, L] and returns the moments; weights get no gradient.

    The loss is the sum of next-token cross entropies, so the result does not depend on `batch_size`. `collector` and
    `first` continue an interrupted run; `after_batch(n)` is called when n samples are done. Raises HeaprError if the
    loss is not finite, or if tokens do not reach the experts.
    """
    collector = collector or MomentCollector(model)
    with collector.attached(), _backward_only_to_activations(model):
        for start in range(first, len(blocks), batch_size):
            ids = blocks[start : start + batch_size].to(model.device)
            logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
            loss = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum")
            check_finite(loss.item(), start)
            loss.backward()
            if after_batch is not None:
                after_batch(start + len(ids))
    collector.check_reached()
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
              resume: bool = False, overwrite: bool = False, processes: Processes = ALONE) -> NeuronMoments:
    """`heapr calibrate`: writes `moments.safetensors`, `calibration.json` and the model's config and tokenizer.

    Every `checkpoint_every` batches the sums are saved; with `resume` a killed run continues from there and ends in the
    same bytes, and a finished one is left as it is. `settings.stream` keeps one decoder layer in memory at a time and
    hidden states in `output`/stream meanwhile. Several `processes` share the samples, and the first writes the result.
    Raises HeaprError on bad input before anything is written, and if the loss becomes NaN on the way.
    """
    if not (resume and any((output / name).is_file() for name in (PARTIAL_FILE, MOMENTS_FILE, CALIBRATION_FILE))):
        check_output(output, overwrite)
    device = processes.device(device)
    check_device(device, allow_auto=True)
    checkpoint = Checkpoint.resolve(settings.model, settings.revision)
    checkpoint.check_unquantized(allow_fp8=True)
    checkpoint.expert_shapes()
    blocks = calibration_blocks(settings, checkpoint)
    mine = processes.share(blocks)
    identity = {**asdict(settings), "revision": checkpoint.commit or settings.revision, "processes": processes.size,
                "dataset_fingerprint": fingerprint(blocks), "base_fingerprint": checkpoint.fingerprint(),
                "checkpoint_bytes": checkpoint.export_bytes(),
                "routed_bytes": checkpoint.export_bytes(routed_only=True)}
    state = SavedState(output, identity, processes)
    if resume and (finished := state.finished()):
        return finished
    partial = state.load() if resume else None
    processes.wait()
    if processes.is_first and not resume:
        state.remove()
    processes.wait()
    started = time.time()
    output.parent.mkdir(parents=True, exist_ok=True)
    try:
        if settings.stream:
            from heapr_vllm.prune.stream import calibrate_streamed

            moments = calibrate_streamed(checkpoint, settings, mine, device, state, partial, checkpoint_every)
        else:
            moments = _calibrate_in_memory(checkpoint, settings, mine, device, state, partial, checkpoint_every)
    except NotFiniteError:
        state.remove()
        raise
    moments = replace(processes.total(moments), metadata=identity)
    if processes.is_first:
        _write_provenance(output, checkpoint, identity, moments, blocks, time.time() - started)
        moments.save_pretrained(output)
        state.remove()
    return moments


def check_finite(loss: float, sample: int) -> None:
    """Raises NotFiniteError if the loss of the batch that starts at `sample` is not finite."""
    if not math.isfinite(loss):
        raise NotFiniteError(f"the loss is {loss} at sample {sample}; try --dtype float32, or check the checkpoint for "
                             "NaN weights")


def check_experts(checkpoint: Checkpoint, collector: MomentCollector) -> None:
    """Raises HeaprError if the checkpoint has routed experts that the model does not expose."""
    if missing := checkpoint.expert_shapes().keys() - collector.sums.keys():
        raise HeaprError(f"{type(collector.model).__name__} does not expose {min(missing)} of the checkpoint; "
                         "this family is not supported")


def _calibrate_in_memory(checkpoint: Checkpoint, settings: CalibrationSettings, blocks: torch.Tensor, device: str,
                         state: SavedState, partial: NeuronMoments | None, every: int) -> NeuronMoments:
    model = load_model(checkpoint, settings.dtype, device)
    collector = MomentCollector(model)
    check_experts(checkpoint, collector)
    first = 0
    if partial is not None:
        collector.restore(partial)
        first = partial.metadata["samples_done"]
    with tqdm(total=blocks.numel(), initial=first * settings.max_seq_length, unit="tok", unit_scale=True,
              desc="calibrating", disable=state.processes.hides_progress) as bar:

        def after_batch(done: int) -> None:
            bar.update(settings.batch_size * settings.max_seq_length)
            if done < len(blocks) and done // settings.batch_size % every == 0:
                state.save(collector, {"samples_done": done})

        return collect_moments(model, blocks, settings.batch_size, collector=collector, first=first,
                               after_batch=after_batch)


def plan(settings: CalibrationSettings, device: str = "cpu") -> dict[str, Any]:
    """`--dry-run`: sizes by formula from the config and the shard headers; no large weight is loaded.

    With `settings.stream` also the peak memory; the text is read for it, since it counts too.
    """
    check_device(device, allow_auto=True)
    checkpoint = Checkpoint.resolve(settings.model, settings.revision)
    checkpoint.check_unquantized(allow_fp8=True)
    shapes = checkpoint.expert_shapes()
    neurons = sum(experts * width for experts, width in shapes.values())
    text = checkpoint.config.get("text_config", checkpoint.config)
    tokens = settings.batch_size * settings.max_seq_length
    scale = 2 if settings.dtype == "float32" and text.get("dtype", text.get("torch_dtype")) == "bfloat16" else 1
    scale *= 2 if checkpoint.fp8_block else 1
    sizes = {"moe_layers": len(shapes), "experts": sum(experts for experts, _ in shapes.values()), "neurons": neurons,
             "calibration_tokens": settings.num_calibration_samples * settings.max_seq_length,
             "weight_bytes": checkpoint.num_bytes() * scale, "accumulator_bytes": 6 * 8 * neurons,
             "logits_bytes": 2 * 4 * tokens * text["vocab_size"],
             "checkpointed_activation_bytes": 4 * tokens * text["hidden_size"] * text["num_hidden_layers"],
             "output_bytes": 6 * 4 * neurons}
    if not settings.stream:
        return sizes
    from heapr_vllm.prune.layered import LayeredModel
    from heapr_vllm.prune.memory import streamed_plan

    del sizes["checkpointed_activation_bytes"]  # on disk here
    blocks = calibration_blocks(settings, checkpoint)
    return sizes | streamed_plan(LayeredModel(checkpoint, settings.dtype, device), *blocks.shape, settings.batch_size)


def calibration_blocks(settings: CalibrationSettings, checkpoint: Checkpoint) -> torch.Tensor:
    """Token blocks int64 [num_calibration_samples, max_seq_length]. Raises HeaprError if the text is not enough."""
    return checkpoint_blocks(checkpoint, settings.dataset, settings.num_calibration_samples, settings.max_seq_length,
                             settings.seed)


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
