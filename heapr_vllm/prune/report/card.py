# SPDX-License-Identifier: Apache-2.0
"""The README.md of a masks repository or a pruned checkpoint."""

from heapr_vllm.environment import install_command
from heapr_vllm.formats.config import PruningConfig
from heapr_vllm.formats.masks import NeuronMasks
from heapr_vllm.formats.repair_record import RepairRecord
from heapr_vllm.prune.calibration.record import CalibrationRecord
from heapr_vllm.prune.report.summary import format_repair, summarize

_WHAT = {
    "masks": "Retained-neuron masks; the weights come from the base model.",
    "compact": "A compact checkpoint: expert tensors hold the kept neurons only; vLLM needs the plugin.",
    "plain": "A plain checkpoint: all experts have one smaller width, which config.json says; any engine loads it.",
    "zeroed": "Full-size weights with the pruned neurons zeroed, for comparison; any engine loads them.",
}
_SERVE = {
    "masks": "vllm serve <this repository> --load-format heapr   # streams the base model's weights and slices them",
    "compact": "vllm serve <this repository>",
}
_GRANULARITY = {"group": "one scale per neuron and group of the hidden size", "channel": "one scale per row"}
_TEMPLATE = """---
base_model: {base}
base_model_relation: {relation}
library_name: vllm
pipeline_tag: text-generation
tags: [moe, pruning, heapr]
---
# {base}, {percent} of routed expert neurons pruned

{what}{own_width}

| | |
|---|---|
| base model | {base} (revision {revision}) |
| method | {criterion}, scope {scope}, align {align} |
| routed neurons kept | {kept:,} of {total:,} |
| stored routed parameters | -{stored:.1%} |
| executed routed FLOPs per token (calibration routing) | -{executed:.1%} |
{experts}{repair}| calibration | {samples} samples, {tokens:,} tokens of {dataset}, seed {seed} |
| dead experts (width 0) | {dead} |

    {install}
    {serve}

Method: HEAPr, arXiv 2509.22299. Made with heapr-vllm {version}.
"""


def model_card(
    masks: NeuronMasks,
    layout: str,
    pruning: PruningConfig | None,
    calibration: CalibrationRecord,
    repair: RepairRecord | None = None,
) -> str:
    """Writes the text of the card. `layout`: masks, or one of `heapr export`; `pruning`: for the plugin."""
    scheme = pruning.expert_scheme if pruning else None
    summary = summarize(masks, calibration, scheme)
    return _TEMPLATE.format(
        base=calibration.model,
        revision=calibration.revision or "none",
        relation="adapter" if layout == "masks" else "quantized",
        what=_WHAT[layout],
        own_width="" if layout == "plain" else " Each expert keeps its own width.",
        percent=f"{summary.stored_reduction:.0%}",
        criterion=masks.metadata["criterion"],
        scope=masks.metadata["scope"],
        align=masks.metadata["align"],
        kept=masks.num_kept,
        total=masks.num_neurons,
        stored=summary.stored_reduction,
        executed=summary.executed_reduction,
        samples=calibration.num_calibration_samples,
        tokens=calibration.calibration_tokens,
        dataset=calibration.dataset_name,
        seed=calibration.seed,
        dead=len(summary.dead_experts),
        experts=f"| experts stored as | {scheme.name}, {_GRANULARITY[scheme.strategy]} |\n" if scheme else "",
        repair=f"| repair | {format_repair(repair)} |\n" if repair else "",
        install=install_command("vllm"),
        serve=_SERVE.get(layout, "vllm serve <this repository>"),
        version=calibration.versions.get("heapr-vllm", "(source)"),
    )
