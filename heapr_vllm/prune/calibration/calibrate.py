# SPDX-License-Identifier: Apache-2.0
"""One forward and one backward pass over calibration text: model in, neuron moments out."""

from __future__ import annotations

import shutil
import time
from contextlib import nullcontext
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

from heapr_vllm.environment import versions
from heapr_vllm.formats import sizes
from heapr_vllm.formats.atomic import CALIBRATION, alone_in, atomic_file, check_output
from heapr_vllm.formats.checkpoint import SIDE_FILES, Checkpoint
from heapr_vllm.formats.fingerprint import fingerprint as model_fingerprint
from heapr_vllm.formats.folder import inside
from heapr_vllm.prune.calibration.in_memory import calibrate_in_memory
from heapr_vllm.prune.calibration.moments import MOMENTS_FILE, NeuronMoments
from heapr_vllm.prune.calibration.processes import ALONE, Processes
from heapr_vllm.prune.calibration.record import CALIBRATION_FILE, CalibrationIdentity, CalibrationRecord
from heapr_vllm.prune.calibration.saved_state import PARTIAL_FILE, SavedState
from heapr_vllm.prune.calibration.settings import CalibrationSettings, NotFiniteError, calibration_samples
from heapr_vllm.prune.models.loading import check_device
from heapr_vllm.prune.text.sources import parse_sources


def calibrate(
    settings: CalibrationSettings,
    output: Path,
    *,
    device: str = "cpu",
    checkpoint_every: int = 8,
    resume: bool = False,
    overwrite: bool = False,
    processes: Processes = ALONE,
) -> NeuronMoments:
    """Does `heapr calibrate`: writes `moments.safetensors`, `calibration.json` and the model's config and tokenizer.

    Every `checkpoint_every` batches the sums are saved; with `resume` a killed run continues from there and ends in the
    same bytes, and a finished one is left as it is. `settings.stream` keeps one decoder layer in memory at a time and
    hidden states in `output`/stream meanwhile. Several `processes` share the samples, and the first writes the result.
    Raises HeaprError on bad input before anything is written, and if the loss becomes NaN on the way.
    """
    if not (resume and any((output / name).is_file() for name in (PARTIAL_FILE, MOMENTS_FILE, CALIBRATION_FILE))):
        names = (
            settings.model,
            settings.chat_template or "",
            *(source.spec for source in parse_sources(settings.dataset)),
        )
        inputs = [path for path in map(Path, names) if path.name and path.exists()]
        check_output(output, CALIBRATION, overwrite=overwrite, inputs=inputs, hint=", --resume to continue it")
    device = processes.device(device)
    check_device(device, allow_auto=True)
    checkpoint = Checkpoint.resolve(settings.model, settings.revision)
    checkpoint.check_unpruned()
    checkpoint.expert_shapes()
    samples = calibration_samples(settings, checkpoint)
    batches = settings.batches(processes.share(samples))
    identity = CalibrationIdentity(
        **asdict(replace(settings, revision=checkpoint.commit or settings.revision)),
        processes=processes.size,
        dataset_fingerprint=samples.fingerprint(),
        base_fingerprint=model_fingerprint(checkpoint),
        checkpoint_bytes=sizes.export_bytes(checkpoint),
        routed_bytes=sizes.export_bytes(checkpoint, routed_only=True),
        routed_weights=sizes.routed_weights(checkpoint),
    )
    processes.check_same(asdict(identity))
    sources = [asdict(source) for source in samples.sources]
    state = SavedState(output, identity, processes, sources)
    with alone_in(output) if processes.is_first else nullcontext():
        processes.check_shared(output)
        if resume and (finished := state.finished()):
            return finished
        saved = state.load() if resume else None
        processes.wait()
        if processes.is_first and not resume:
            state.remove()
        processes.wait()
        started = time.time()
        try:
            if settings.stream:
                from heapr_vllm.prune.calibration.streamed import calibrate_streamed

                moments = calibrate_streamed(checkpoint, settings, batches, device, state, saved, checkpoint_every)
            else:
                moments = calibrate_in_memory(checkpoint, settings, batches, device, state, saved, checkpoint_every)
        except NotFiniteError:
            state.remove()
            raise
        counts = {
            "calibration_tokens": samples.tokens,
            "loss_tokens": samples.predictions,
            "sources": sources,
        }
        moments = replace(processes.total(moments), metadata=asdict(identity) | counts)
        if processes.is_first:
            record = CalibrationRecord(
                **asdict(identity),
                calibration_tokens=samples.tokens,
                loss_tokens=samples.predictions,
                sources=samples.sources,
                wall_time_seconds=round(time.time() - started, 1),
                versions=versions(),
                tokens={prefix: tokens.tolist() for prefix, tokens in moments.tokens.items()},
            )
            (output / CALIBRATION_FILE).unlink(missing_ok=True)  # of another run: until ours is there, nothing is whole
            moments.save_pretrained(output)
            _copy_side_files(checkpoint, output)
            record.write(output)
            state.remove()
    return moments


def _copy_side_files(checkpoint: Checkpoint, output: Path) -> None:
    """Copies config and tokenizer, with which `heapr prune` makes a repository that vLLM serves."""
    for name in ("config.json", *SIDE_FILES):
        if inside(checkpoint.path, name).is_file():
            write = partial(shutil.copyfile, checkpoint.path / name)
            atomic_file(output / name, write)
        else:
            (output / name).unlink(missing_ok=True)  # of the model that was calibrated here before
