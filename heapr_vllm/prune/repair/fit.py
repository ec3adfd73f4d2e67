# SPDX-License-Identifier: Apache-2.0
"""`heapr export --repair`: second moments over the calibration text, compensations on disk, refitted tensors.

Second moments take E I^2 doubles per layer, too many for the moments file and perhaps for memory, so the model runs
over the text once per group of layers, or, after a streamed calibration, once with one layer in memory. What it leaves,
one compensation per expert, is applied shard by shard. Experts that are to have 4 bits are rounded with their second
moments at hand, and leave codes instead.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from safetensors import safe_open
from transformers import PreTrainedModel

from heapr_vllm.errors import HeaprError
from heapr_vllm.formats.atomic import atomic_file
from heapr_vllm.formats.checkpoint import Checkpoint
from heapr_vllm.formats.fingerprint import former_fingerprint
from heapr_vllm.formats.masks import NeuronMasks
from heapr_vllm.formats.names import ExpertTensor, natural_order
from heapr_vllm.formats.quantized import SCALE_SUFFIX, ExpertScheme
from heapr_vllm.formats.repair_record import RepairRecord
from heapr_vllm.formats.schema import read_json
from heapr_vllm.formats.tensorfile import save_tensors
from heapr_vllm.progress import progress
from heapr_vllm.prune.calibration.record import CalibrationRecord
from heapr_vllm.prune.calibration.settings import calibration_samples
from heapr_vllm.prune.models.experts import expert_modules
from heapr_vllm.prune.models.hidden_states import ActivationStore
from heapr_vllm.prune.models.layered import LayeredModel
from heapr_vllm.prune.models.loading import check_device, load_model
from heapr_vllm.prune.repair.least_squares import PRIOR, compensate, output_error, repairable, ridged, solved
from heapr_vllm.prune.repair.rounding import rounded_down
from heapr_vllm.prune.repair.second_moments import SecondMoment, collect_second_moments, stream_second_moments
from heapr_vllm.prune.text.batches import Batch
from heapr_vllm.prune.text.samples import Samples

METHODS = ("least-squares",)
STATE_FILE = "state.json"
BITS_TO_ROUND = 4  # rounding to 8 changes no perplexity that could be measured, to the nearest codes or not


@dataclass(frozen=True)
class RepairState:
    """The content of state.json: what a fit depends on, and the output errors of finished modules by prefix."""

    identity: str
    errors: dict[str, tuple[float, float]]


@dataclass(frozen=True, kw_only=True)
class RepairSettings:
    """How to refit, and what the export is handed to do so.

    `dataset`, `num_samples`: the text, that of the calibration by default. `memory`: bytes for second moments.
    """

    method: str = "least-squares"
    dataset: str | None = None
    num_samples: int | None = None
    memory: int = 8 * 2**30
    device: str = "cpu"

    def fit(
        self,
        base: Checkpoint,
        masks: NeuronMasks,
        calibration: CalibrationRecord,
        scheme: ExpertScheme | None,
        folder: Path,
    ) -> Repair:
        """Does `fit_repair` with these settings."""
        return fit_repair(base, masks, calibration, scheme, self, folder)


@dataclass(frozen=True)
class Repair:
    """What was fitted, one file in `folder` per MoE module, as a stage of the export.

    By expert a file has compensations, or, if there is a `rounding`, codes and, with "_scale" after the number, scales.
    `record`: how they came about.
    """

    folder: Path
    masks: NeuronMasks
    record: RepairRecord
    rounding: ExpertScheme | None = None

    def tensors(self, name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
        """Refits the kept columns of a down_proj, which keeps its full size; other tensors pass as they are.

        Where there is a rounding they become float32 values of codes.
        """
        where = ExpertTensor.parse(name)
        if where is None or where.shard != "w2" or not _module_file(self.folder, where.prefix).is_file():
            return {name: tensor}
        dtype = torch.float32 if self.rounding else tensor.dtype
        stack = (tensor if where.expert is None else tensor[None]).to(dtype, copy=True)
        experts = range(len(stack)) if where.expert is None else [where.expert]
        with safe_open(_module_file(self.folder, where.prefix), framework="pt") as file:
            fitted = set(file.keys())
            for index, expert in enumerate(experts):
                if str(expert) in fitted:
                    keep = self.masks.keep[where.prefix][expert]
                    self._refit(stack[index], keep, expert, file)
        return {name: stack.view(tensor.shape)}

    def _refit(self, weight: torch.Tensor, keep: torch.Tensor, expert: int, file: safe_open) -> None:
        """Refits a down_proj [H, I] in place."""
        fitted = file.get_tensor(str(expert))
        if self.rounding is None:
            weight.copy_(compensate(weight, keep, fitted))
        else:
            weight[:, keep] = self.rounding.dequantize(fitted, file.get_tensor(f"{expert}{SCALE_SUFFIX}"), "w2")

    def discard(self) -> None:
        """Removes what is in the folder."""
        _discard(self.folder)


def fit_repair(
    base: Checkpoint,
    masks: NeuronMasks,
    calibration: CalibrationRecord,
    scheme: ExpertScheme | None,
    settings: RepairSettings,
    folder: Path,
) -> Repair:
    """Writes the compensations of every expert that loses some neurons into `folder`, and returns them.

    `scheme`: how experts will be stored; with down_proj in 4 bits the codes of every expert with neurons are written
    instead. Text, seed, length, batch size and dtype are those of the `calibration`. What an interrupted run with the
    same input left in `folder` is not computed again. Raises HeaprError if the text is missing, changed or too short,
    or if `settings` cannot be met, before anything is written.
    """
    if settings.method not in METHODS:
        raise HeaprError(f"repair {settings.method!r} is not one of {', '.join(METHODS)}")
    check_device(settings.device)
    rounding = rounding_of(scheme)
    experts = repairable(masks, whole=rounding is not None)
    if not experts:
        raise HeaprError(
            "every expert is kept whole or removed whole, so there is nothing to repair; export without --repair"
        )
    groups = layer_groups(masks, experts, settings.memory)
    samples = _samples(base, calibration, settings)
    thin = check_tokens(masks, experts, calibration, len(samples))
    record = RepairRecord(
        method=settings.method,
        dataset=settings.dataset or calibration.dataset_name,
        dataset_fingerprint=samples.fingerprint(),
        num_samples=len(samples),
        max_seq_length=calibration.max_seq_length,
        seed=calibration.seed,
        tokens=samples.tokens,
        prior=PRIOR,
        experts=sum(map(len, experts.values())),
        experts_with_few_tokens=thin,
        output_error_removed=0.0,
    )
    identity = _identity(record, base, {prefix: masks.keep[prefix] for prefix in experts}, calibration, rounding)
    folder.mkdir(parents=True, exist_ok=True)
    errors = _load_state(folder, identity)
    if not errors:
        _discard(folder)
    wanted = {prefix: chosen for prefix, chosen in experts.items() if prefix not in errors}
    if wanted:
        batches = calibration.batches(samples)
        if calibration.stream:
            model = LayeredModel(base, calibration.dtype, settings.device)
            collected = _streamed(model, batches, wanted, folder)
        else:
            model = load_model(base, calibration.dtype, settings.device)
            collected = _in_memory(model, batches, wanted, groups)
        for prefix, moments, weights in collected:
            errors[prefix] = _fit_module(weights, moments, masks.keep[prefix], rounding, _module_file(folder, prefix))
            _save_state(folder, identity, errors)
    before, after = torch.tensor(list(errors.values())).double().sum(0).tolist()
    record = replace(record, output_error_removed=1 - after / before if before else 0.0)
    return Repair(folder, masks, record, rounding)


def rounding_of(scheme: ExpertScheme | None) -> ExpertScheme | None:
    """Returns how experts will be stored if a repair is to round their down_proj; None if it only refits it."""
    return scheme if scheme and scheme.of("w2").num_bits == BITS_TO_ROUND else None


def _identity(
    record: RepairRecord,
    base: Checkpoint,
    keep: dict[str, torch.Tensor],
    calibration: CalibrationRecord,
    rounding: ExpertScheme | None,
) -> str:
    """Hashes all that the compensations depend on; `keep`: prefix -> bool [E, I]."""
    inputs = asdict(record)
    del inputs["output_error_removed"]  # the result
    inputs |= {
        "dtype": calibration.dtype,
        "batch_size": calibration.batch_size,
        "base": [str(base.path.resolve()), former_fingerprint(base)],
        "keep": hashlib.sha256(b"".join(mask.numpy().tobytes() for mask in keep.values())).hexdigest(),
    }
    if rounding:
        inputs["rounding"] = rounding.to_dict()
    return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()


Collected = Iterator[tuple[str, dict[int, SecondMoment], torch.Tensor]]  # MoE module prefix, moments, down_proj


def _in_memory(
    model: PreTrainedModel, batches: list[Batch], wanted: dict[str, list[int]], groups: list[list[str]]
) -> Collected:
    """Runs one forward pass of the whole model per group of layers in which any is wanted."""
    missing = [group for group in groups if wanted.keys() & set(group)]
    modules = expert_modules(model)
    tokens = sum(batch.ids.numel() for batch in batches)
    with progress(total=len(missing) * tokens, unit="tok", unit_scale=True, desc="repairing") as bar:

        def advance(batch: Batch) -> None:
            bar.update(batch.ids.numel())

        for group in missing:
            experts = {prefix: wanted[prefix] for prefix in group if prefix in wanted}
            moments = collect_second_moments(model, batches, experts=experts, after_batch=advance)
            for prefix in experts:
                yield prefix, moments.pop(prefix), modules[prefix].down_proj


def _streamed(model: LayeredModel, batches: list[Batch], wanted: dict[str, list[int]], folder: Path) -> Collected:
    """Runs one forward pass with one layer in memory; hidden states are in `folder` meanwhile."""
    with (
        progress(total=len(model.layers) * batches[-1].done, unit="sample", desc="repairing") as bar,
        TemporaryDirectory(dir=folder) as store,
    ):

        def advance(batch: Batch) -> None:
            bar.update(batch.samples)

        yield from stream_second_moments(model, batches, ActivationStore(Path(store)), wanted, advance)


def layer_groups(masks: NeuronMasks, experts: dict[str, list[int]], memory: int) -> list[list[str]]:
    """Cuts MoE module prefixes, in order, into groups whose second moments take at most `memory` bytes.

    Raises HeaprError if those of one layer take more.
    """
    groups: list[list[str]] = [[]]
    used = 0
    for prefix in sorted(experts, key=natural_order):
        size = 8 * len(experts[prefix]) * masks.keep[prefix].shape[1] ** 2
        if size > memory:
            raise HeaprError(
                f"the second moments of {prefix} take {size / 2**20:,.1f} MiB; pass --repair-memory "
                f"{math.ceil(size / 2**20)}MiB or more"
            )
        if used + size > memory:
            groups.append([])
            used = 0
        groups[-1].append(prefix)
        used += size
    return groups


def check_tokens(
    masks: NeuronMasks, experts: dict[str, list[int]], calibration: CalibrationRecord, num_samples: int
) -> int:
    """Counts the experts that see fewer tokens than they keep neurons, going by the routing of the calibration.

    They stay close to their original weights: a warning, and a HeaprError if they are the majority. Both say how many
    samples would do. Masks for another mix than the calibrated one do not say how the text was routed; then none count.
    """
    if calibration.mix is not None:
        return 0
    scale = num_samples / calibration.num_calibration_samples
    pairs: list[tuple[int, float]] = []
    for prefix, chosen in experts.items():
        widths, tokens = masks.widths[prefix].tolist(), calibration.tokens[prefix]
        pairs += [(widths[expert], tokens[expert] * scale) for expert in chosen]
    thin = sum(seen < width for width, seen in pairs)
    if thin:
        needed = math.ceil(num_samples * max((width / seen for width, seen in pairs if seen), default=1))
        message = (
            f"{thin} of the {len(pairs)} experts to repair see fewer tokens than they keep neurons with "
            f"{num_samples} samples; --repair-samples {needed} would do for all that see any"
        )
        if thin > len(pairs) / 2:
            raise HeaprError(f"too little text for a repair: {message}")
        warnings.warn(f"{message}; they stay close to their original weights", stacklevel=2)
    return thin


def _samples(base: Checkpoint, calibration: CalibrationRecord, settings: RepairSettings) -> Samples:
    """Draws samples as `heapr calibrate` draws them, after checking that its text is still the same."""
    recorded = calibration.settings
    if settings.dataset is None:
        try:
            samples = calibration_samples(recorded, base)
        except HeaprError as error:
            raise HeaprError(
                f"a repair needs the calibration text: {error}; or name another text with --repair-dataset"
            ) from error
        if samples.fingerprint() != calibration.dataset_fingerprint:
            raise HeaprError(
                f"{calibration.dataset_name} is not the text of the calibration any more (its fingerprint "
                "differs); restore it, calibrate again, or accept a text with --repair-dataset"
            )
        if settings.num_samples in (None, len(samples)):
            return samples
    other = replace(
        recorded,
        dataset=settings.dataset or recorded.dataset,
        loss="all",  # a repair has none
        num_calibration_samples=settings.num_samples or recorded.num_calibration_samples,
    )
    return calibration_samples(other, base)


def _fit_module(
    weights: torch.Tensor,
    moments: dict[int, SecondMoment],
    keep: torch.Tensor,
    rounding: ExpertScheme | None,
    path: Path,
) -> tuple[float, float]:
    """Writes what is fitted for one MoE module; returns its output error without and with that.

    `weights`: down_proj [E, H, I], `keep`: bool [E, I].
    """
    tensors: dict[str, torch.Tensor] = {}
    before = after = 0.0
    for expert, moment in moments.items():
        weight, kept = weights[expert], keep[expert].to(weights.device)
        matrix, fitted = fit_expert(weight, moment, kept, rounding)
        unfitted = weight[:, kept]
        if rounding is None:
            tensors[str(expert)] = matrix.float()
        else:
            unfitted = rounding.dequantize(*rounding.quantize(unfitted, "w2"), "w2")
            codes, scale = rounding.quantize(fitted, "w2")
            tensors |= {str(expert): codes, f"{expert}{SCALE_SUFFIX}": scale}
            fitted = rounding.dequantize(codes, scale, "w2")
        before += output_error(weight, moment, kept, unfitted)
        after += output_error(weight, moment, kept, fitted)
    save_tensors(path, {name: tensor.contiguous().cpu() for name, tensor in tensors.items()}, {})
    return before, after


def fit_expert(
    weight: torch.Tensor, moment: SecondMoment, keep: torch.Tensor, rounding: ExpertScheme | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Computes B float64 [|R|, |K|] for a down_proj [H, I] and `keep` bool [I], and the refitted columns [H, |K|].

    These are float64, or if there is a `rounding` float32 values of codes, unless no token says what they add up to:
    then the nearest codes will do. Raises HeaprError if the second moment is not finite.
    """
    seen = ridged(moment, keep)
    matrix = solved(seen, moment, keep)
    columns = compensate(weight.double(), keep, matrix)[:, keep]
    return matrix, columns if rounding is None or seen is None else rounded_down(columns, seen, rounding)


def _module_file(folder: Path, prefix: str) -> Path:
    return folder / f"{prefix}.safetensors"


def _load_state(folder: Path, identity: str) -> dict[str, tuple[float, float]]:
    """Reads finished modules with their output errors; empty if there are none, or of another repair."""
    path = folder / STATE_FILE
    if not path.is_file():
        return {}
    state = read_json(path, RepairState, f"remove {folder}")
    return state.errors if state.identity == identity else {}


def _discard(folder: Path) -> None:
    """Empties `folder`; the state goes first, so that it never promises a file that is gone or of another repair."""
    (folder / STATE_FILE).unlink(missing_ok=True)
    for path in folder.iterdir():
        shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink()


def _save_state(folder: Path, identity: str, errors: dict[str, tuple[float, float]]) -> None:
    text = json.dumps({"identity": identity, "errors": errors})
    atomic_file(folder / STATE_FILE, lambda path: path.write_text(text))
