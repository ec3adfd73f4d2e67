# SPDX-License-Identifier: Apache-2.0
"""The README.md of a masks repository or a pruned checkpoint: metadata for the Hub, use, results, limits."""

from __future__ import annotations

import html
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from heapr_vllm.environment import SUPPORTED_VLLM, install_command
from heapr_vllm.errors import HeaprError
from heapr_vllm.formats.atomic import atomic_file
from heapr_vllm.formats.checkpoint import Checkpoint
from heapr_vllm.formats.config import BaseModel, PruningConfig
from heapr_vllm.formats.evaluation_record import EvaluationRecord
from heapr_vllm.formats.masks import file_sha256
from heapr_vllm.formats.pruned import masks_path, read_masks
from heapr_vllm.formats.repair_record import RepairRecord
from heapr_vllm.prune.calibration.record import CalibrationRecord
from heapr_vllm.prune.report.measured import (
    EVALUATION_FILE,
    Measured,
    format_divergence,
    format_task,
    format_top1,
    measured,
    own_evaluation,
)
from heapr_vllm.prune.report.summary import Summary, choice_lines, format_repair, load_report, speed_note
from heapr_vllm.prune.selection.budget import format_size
from heapr_vllm.prune.text.sources import public_name

CARD_FILE = "README.md"
_WHAT = {
    "masks": "Retained-neuron masks; the weights come from the base model.",
    "compact": "A compact checkpoint: expert tensors hold the kept neurons only; vLLM needs the plugin.",
    "plain": "A plain checkpoint: all experts have one smaller width, which config.json says; engines that know the "
    "family load it.",
    "zeroed": "Full-size weights with the pruned neurons zeroed, for comparison; any engine loads them.",
}
_SERVE = {
    "masks": "vllm serve <this repository> --load-format heapr   # streams the base model's weights and slices them",
    "compact": "vllm serve <this repository>",
}
_GRANULARITY = {"group": "one scale per neuron and group of the hidden size", "channel": "one scale per row"}
_TEMPLATE = """---
{metadata}
---
# {base}, {percent} of routed expert neurons pruned

{what}{own_width}

| | |
|---|---|
| base model | {base} (revision {revision}) |
| method | {criterion}, scope {scope}, align {align} |
{experts}{repair}| calibration | {samples} samples, {tokens:,} tokens of {dataset}, seed {seed} |
| dead experts (width 0) | {dead} |

{choice}## Sizes

| | base | pruned | |
|---|---|---|---|
{sizes}

## Serving

    {install}
    {serve}

## Quality

{quality}

## Limits

{limits}

## Licence

The weights derive from {base}, whose licence holds for them too.

Method: HEAPr, arXiv 2509.22299. Made with heapr-vllm {version}.
"""


def model_card(
    summary: Summary,
    layout: str,
    pruning: PruningConfig | None,
    calibration: CalibrationRecord,
    found: Measured | None = None,
) -> str:
    """Writes the text of the card. `layout`: masks, or one of `heapr export`; `pruning`: for the plugin."""
    scheme = pruning.expert_scheme if pruning else None
    repair, method = summary.repair, summary.metadata
    choice = "\n".join(f"- {_text(line)}" for line in choice_lines(summary))
    base = _name(calibration.model)
    percent = f"{summary.stored_reduction:.0%}"
    return _TEMPLATE.format(
        metadata=_metadata(calibration, layout, f"{base}, {percent} pruned", found),
        base=_text(base),
        revision=_text(calibration.revision or "none"),
        what=_WHAT[layout],
        own_width="" if layout == "plain" else " Each expert keeps its own width.",
        percent=percent,
        criterion=_text(method["criterion"]),
        scope=_text(method["scope"]),
        align=method["align"],
        samples=calibration.num_calibration_samples,
        tokens=calibration.calibration_tokens,
        dataset=_text(_names(calibration.dataset)),
        seed=calibration.seed,
        dead=len(summary.dead_experts),
        experts=f"| experts stored as | {scheme.name}, {_GRANULARITY[scheme.strategy]} |\n" if scheme else "",
        repair=f"| repair | {_text(format_repair(_without_paths(repair)))} |\n" if repair else "",
        choice=f"## Choice\n\n{choice}\n\n" if choice else "",
        sizes=_rows(_sizes(summary, layout)),
        quality=_quality(found),
        limits=_limits(summary, layout, found),
        install=install_command("vllm"),
        serve=_SERVE.get(layout, "vllm serve <this repository>"),
        version=_text(calibration.versions.get("heapr-vllm", "(source)")),
    )


def write_results(directory: Path, evaluation: EvaluationRecord) -> None:
    """Writes the evaluation of a pruned model into its folder and its card.

    Raises HeaprError if the folder is no pruned model, `evaluation` does not have it, or the card is not as heapr wrote
    it: what somebody added is not overwritten.
    """
    masks = read_masks(directory)
    digest = file_sha256(masks_path(directory))
    found = measured(evaluation, directory, digest, masks.sparsity)
    if found is None:
        raise HeaprError(
            f"{directory} is not among the models of the evaluation; run `heapr eval {directory} --baseline BASE "
            "--dataset TEXT -o evaluation.json`"
        )
    path = directory / CARD_FILE
    before = own_evaluation(directory)
    known = measured(before, directory, digest, masks.sparsity, is_own=True) if before else None
    if path.is_file() and path.read_text() not in (card_of(directory, each) for each in (None, known, found)):
        raise HeaprError(
            f"{path} was changed, or written by another version of heapr-vllm; move it away, and a new one is written"
        )
    text = card_of(directory, found)
    found.alone.write(directory / EVALUATION_FILE)
    atomic_file(path, lambda partial: partial.write_text(text))


def card_of(directory: Path, found: Measured | None = None) -> str:
    """Writes the text of the card of a masks repository or an exported checkpoint, by all its other files.

    Raises HeaprError if it is neither.
    """
    summary = load_report(directory)
    calibration = CalibrationRecord.read(directory / "heapr", "run `heapr prune` again")
    pruning = Checkpoint(directory).pruning
    layout = pruning.layout if pruning else _layout_for_any_engine(directory, summary)
    return model_card(summary, layout, pruning, calibration, found)


def _layout_for_any_engine(directory: Path, summary: Summary) -> str:
    """Tells plain from zeroed checkpoints, which have no `quantization_config` of ours."""
    full = {prefix: (len(widths), summary.full_width[prefix]) for prefix, widths in summary.widths.items()}
    return "zeroed" if Checkpoint(directory).expert_shapes() == full else "plain"


def _metadata(calibration: CalibrationRecord, layout: str, name: str, found: Measured | None) -> str:
    """Writes the YAML that the Hub reads. A base model that is no repository of the Hub is left out of it."""
    from huggingface_hub import ModelCardData

    known: dict[str, Any] = {}
    if is_on_hub(BaseModel(calibration.model, calibration.revision)):
        known = {"base_model": calibration.model}
        known["base_model_relation"] = "adapter" if layout == "masks" else "quantized"
    if found:
        known |= {"model_name": name, "eval_results": _eval_results(found)}
    return ModelCardData(
        library_name="vllm", pipeline_tag="text-generation", tags=["moe", "pruning", "heapr"], **known
    ).to_yaml()


def _eval_results(found: Measured) -> list[Any]:
    """Lists the model's numbers as the Hub's `model-index` has them."""
    from huggingface_hub import EvalResult

    text = _names(found.record.settings.dataset)
    numbers = {"perplexity": found.model.perplexity}
    if found.model.agreement:
        numbers |= {"kl_divergence": found.model.agreement.kl_divergence, "top1_agreement": found.model.agreement.top1}
    results = [(text, name, value) for name, value in numbers.items()]
    results += [(name, task.metric, task.value) for name, task, _ in found.tasks]
    return [
        EvalResult(
            task_type="text-generation",
            dataset_type=re.sub(r"[^\w./-]+", "-", dataset).strip("-") or "text",
            dataset_name=dataset,
            metric_type=metric,
            metric_value=value,
        )
        for dataset, metric, value in results
    ]


def _sizes(summary: Summary, layout: str) -> list[list[str]]:
    rows = [["routed neurons", f"{summary.neurons:,}", f"{summary.kept:,}", f"-{summary.stored_reduction:.1%}"]]
    rows.append(["routed FLOPs per token, by the calibration's routing", "", "", f"-{summary.executed_reduction:.1%}"])
    before, after = summary.checkpoint_bytes, summary.compact_bytes
    if before and after:
        what = "weights once loaded or exported" if layout == "masks" else "weights"
        rows.append([what, format_size(before), format_size(after), f"{after / before - 1:+.1%}"])
    return rows


def _quality(found: Measured | None) -> str:
    if found is None:
        return (
            "Not measured yet. `heapr eval DIR --baseline BASE --dataset TEXT -o evaluation.json`, then "
            "`heapr report DIR --evaluation evaluation.json --card -o report.html`, puts the numbers here."
        )
    base, model, on = found.baseline, found.model, found.record.settings
    rows = [["perplexity", f"{base.perplexity:.3f}", f"{model.perplexity:.3f}", f"{model.change:+.2%}"]]
    if model.agreement:
        rows.append(["KL divergence from the base, nats", "", format_divergence(model.agreement), ""])
        rows.append(["same most likely token", "", format_top1(model.agreement), ""])
    for name, task, other in found.tasks:
        recovery = "" if task.recovery is None else f"{task.recovery:.1%} of the base's"
        before = format_task(other) if other else ""
        rows.append([_text(f"{name}, {task.metric}"), before, format_task(task), recovery])
    return (
        f"{on.num_samples} x up to {on.max_seq_length} tokens of {_text(_names(on.dataset))}, {_counted(on.loss)}"
        f"seed {on.seed}, run by "
        f"{_text(on.backend)}, dtype {_text(on.dtype)}; 95 % intervals in brackets.\n\n"
        f"| | {_text(_name(base.model))} | this model | |\n|---|---|---|---|\n{_rows(rows)}"
    )


def _limits(summary: Summary, layout: str, found: Measured | None) -> str:
    """Lists what a user should know before trusting the model."""
    lines = ["Neurons were chosen for the calibration text; on other text experts may be missed that it did not need."]
    if layout in ("masks", "compact"):
        lines.append(f"vLLM needs the plugin of heapr-vllm, which supports `vllm{SUPPORTED_VLLM}`.")
        lines.append("Other engines need full-size weights: `heapr unpack <this repository> -o full` writes them.")
    if note := speed_note(summary):
        lines.append(note.removeprefix("note: "))
    if summary.unrouted_experts:
        lines.append(f"{len(summary.unrouted_experts)} experts got no calibration token, so nothing is known of them.")
    if found is None:
        lines.append("What the pruning costs in quality has not been measured.")
    elif not found.model.tasks:
        lines.append("Measured on running text alone, on no task.")
    return "\n".join(f"- {line}" for line in lines)


def _rows(rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _text(text: object) -> str:
    """Escapes what Markdown or HTML would take for markup: names are anybody's."""
    return re.sub(r"[\\|\[]", r"\\\g<0>", html.escape(" ".join(str(text).split()), quote=False))


def _name(spec: str) -> str:
    """Shortens a local path to its last part; Hub ids stay whole."""
    return Path(spec).name if spec.startswith(("/", ".", "~")) else spec


def _names(dataset: str | list[str]) -> str:
    """Names a data set, those of a mix too."""
    return ", ".join(map(public_name, [dataset] if isinstance(dataset, str) else dataset))


def _without_paths(repair: RepairRecord) -> RepairRecord:
    return replace(repair, dataset=_names(repair.dataset.split(", ")))


def _counted(loss: str) -> str:
    return "" if loss == "all" else f"{_text(loss)} tokens only, "


def is_on_hub(base: BaseModel) -> bool:
    """Tells whether others can get a base model: by its id, at its commit."""
    return bool(base.revision) and _is_hub_id(base.name_or_path)


def _is_hub_id(name: str) -> bool:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True
