# SPDX-License-Identifier: Apache-2.0
"""Which families work how: every family's tiny model through every way of serving it, against stock vLLM.

    python -m tools.families                          # all families and modes, as a Markdown table
    python -m tools.families mixtral --modes TP=2     # a part of it
    python -m tools.families --work build/families    # keeps what is done and continues there

The oracle is stock vLLM, eager and on one rank, on the checkpoint with the pruned neurons zeroed, on the CPU, without
vLLM's rotary op, which is wrong for DeepSeek there. Where the plugin's output is another or none, stock vLLM is tried
in the same mode: it may differ from itself, or fail too. Its expert parallelism always fails on CPUs, so tensor
parallelism stands in for it.
"""

import argparse
import json
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from heapr_vllm.formats.checkpoint import Checkpoint
from heapr_vllm.formats.quantized import NAMES, ExpertScheme
from heapr_vllm.prune import CalibrationSettings, NeuronMoments, export_checkpoint, write_masks_repository
from heapr_vllm.prune.calibration.calibrate import calibrate
from heapr_vllm.prune.models.loading import load_model
from tests import quantized_models, tiny_models
from tests.conftest import awkward
from tests.model_executor import engine

ENVIRONMENT = {"HEAPR_CPU_BUCKETS": "always", "VLLM_MLA_DISABLE": "1"}  # the CPU's MLA is half precision only
CONFIG_FROM_PLUGIN = ("deepseek",)  # vLLM has the model, but nobody has the config
NOT_SERVED_HERE = ("qwen3_5_moe", "qwen3_5_moe_vl")  # vLLM imports torchvision, PyPI has none for a CPU-only PyTorch
# vLLM's rotary op for CPUs misreads DeepSeek's queries, of which it turns a part per head (eager, on one rank)
CUSTOM_OPS = {"custom_ops": ["-rotary_embedding"]}
# the second: no other type for the state of linear attention on CPUs runs in vLLM 0.26
ARGUMENTS: dict[str, Any] = {"compilation_config": CUSTOM_OPS, "mamba_ssm_cache_dtype": "float32"}
QUANTIZED = (
    "qwen3_moe+fp8-block",
    "deepseek_v3+fp8-block",
    "qwen3_moe+fp8-channel",
    "qwen3_moe+int8-channel",
    "qwen3_moe+int8-linears",
    "qwen3_moe+gptq",
    "deepseek_v3+awq",
    "qwen3_moe+w4a16",
    "qwen3_moe+w4a16-asymmetric",
    "qwen3_moe+int8",
    "deepseek_v3+fp8",
    "qwen3_moe+int4",
)  # family, and the format of its base model, or that of its experts alone: written by the export, or while loading
TOLERANCE = 1e-4  # of prompt logprobs in fp32
TOLERANCES = {"qwen3_next_linear": 1 / 16}  # bf16: the step between logits from 8 to 16, after one other rounding

Output = dict[str, Any] | str  # tokens and logprobs, or why there are none


class Mode(NamedTuple):
    """`folder`: of the pruned model; the rest goes to `vllm.LLM` and into the environment."""

    folder: str
    arguments: dict[str, Any]
    env: dict[str, str] = {}


STOCK = Mode("zeroed", {})
MODES = {
    "compact": Mode("compact", {}),
    "masks": Mode("masks", {"load_format": "heapr"}),
    "TP=2": Mode("compact", {"tensor_parallel_size": 2}, engine.TWO_RANKS),
    # vLLM's CPU workers allocate what a pipeline stage receives in their warm-up, which they skip without a compiler
    "PP=2": Mode(
        "compact",
        {
            "pipeline_parallel_size": 2,
            "enforce_eager": False,
            "compilation_config": {**CUSTOM_OPS, "mode": 2, "backend": "eager"},
        },
        engine.TWO_RANKS,
    ),
    "EP=2": Mode("compact", {"tensor_parallel_size": 2, "enable_expert_parallel": True}, engine.TWO_RANKS),
    "compile": Mode("compact", {"enforce_eager": False}),
}


def prepare(name: str, folder: Path, corpus: Path, edit_base: Callable[[Path], None] = lambda base: None) -> Path:
    """Base model, calibration, masks with widths 0, 1, odd and full, and both checkpoints of a family, if not there.

    `name` may be one of QUANTIZED.
    """
    work = folder / name
    if (work / "zeroed").is_dir():
        return work
    shutil.rmtree(work, ignore_errors=True)  # what a killed run left
    family, _, stored = name.partition("+")
    base = tiny_models.save(family, work / "plain")
    edit_base(base)
    if stored in quantized_models.FORMATS:
        base = quantized_models.quantized(base, work / "base", stored)
    calibrate(
        CalibrationSettings(model=str(base), dataset=str(corpus), num_calibration_samples=4, max_seq_length=64),
        work / "calib",
    )
    masks = awkward(NeuronMoments.from_pretrained(work / "calib"))
    scheme = ExpertScheme.for_hidden_size(stored, Checkpoint(base).hidden_size) if stored in NAMES.values() else None
    write_masks_repository(masks, work / "calib", work / "masks", scheme=scheme)
    export_checkpoint(work / "masks", work / "compact")
    if scheme is not None:
        base = quantized_models.rounded(base, work / "rounded", scheme)
    elif stored:
        base = quantized_models.dequantized(base, work / "dequantized")
    export_checkpoint(work / "masks", work / "zeroed", layout="zeroed", model=str(base), quantize=_full_size(base))
    return work


def _full_size(base: Path) -> str:
    """How the oracle stores what is not an expert: as the base does."""
    return "keep" if Checkpoint(base).base_quantization else "none"


def serve(folders: list[Path], mode: Mode) -> Iterator[tuple[str, Output]]:
    """Family and output of every model."""
    outputs = engine.generate_many(
        [folder / mode.folder for folder in folders], env=ENVIRONMENT | mode.env, **ARGUMENTS | mode.arguments
    )
    return zip((folder.name for folder in folders), outputs, strict=True)


def stock(folders: list[Path], mode: Mode = STOCK) -> Iterator[tuple[str, Output]]:
    """The same from vLLM's own experts on the zeroed checkpoints, without the plugin unless its config is needed."""
    for needed, plugins in ((False, {"VLLM_PLUGINS": ""}), (True, {})):
        if part := [folder for folder in folders if (folder.name in CONFIG_FROM_PLUGIN) == needed]:
            yield from serve(part, mode._replace(folder=STOCK.folder, env=mode.env | plugins))


def in_transformers(folder: Path) -> dict[str, Any]:
    """Prompt logprobs that transformers gives the model on the zeroed checkpoint, as calibration runs it."""
    model = load_model(Checkpoint(folder / STOCK.folder), "auto", "cpu").eval()
    with torch.no_grad():
        logprobs = [model(torch.tensor([prompt])).logits[0].float().log_softmax(-1) for prompt in engine.PROMPTS]
    return {
        "logprobs": [
            rows[range(len(prompt) - 1), prompt[1:]].tolist()
            for prompt, rows in zip(engine.PROMPTS, logprobs, strict=True)
        ]
    }


def same(family: str, found: Output, expected: Output) -> bool:
    """Whether there are outputs with equal greedy ids and prompt logprobs within the family's tolerance."""
    if isinstance(found, str) or isinstance(expected, str) or found["ids"] != expected["ids"]:
        return False
    return distance(found, expected) < TOLERANCES.get(family, TOLERANCE)


def distance(found: dict[str, Any], expected: dict[str, Any]) -> float:
    """Largest difference of a prompt logprob."""
    return max(
        abs(a - b)
        for logprobs, wanted in zip(found["logprobs"], expected["logprobs"], strict=True)
        for a, b in zip(logprobs, wanted, strict=True)
    )


def measure(folders: list[Path], modes: list[str], record: Path) -> dict[str, dict[str, Output]]:
    """Outputs by mode and family, written to `record` as they come; what it holds is not computed again.

    Only what took too long is tried again: the machine may have been busy.
    """
    found: dict[str, dict[str, Output]] = json.loads(record.read_text()) if record.is_file() else {}

    def add(
        name: str, run: Callable[[list[Path], Mode], Iterator[tuple[str, Output]]], mode: Mode, wanted: list[Path]
    ) -> None:
        outputs = found.setdefault(name, {})
        missing = [folder for folder in wanted if outputs.get(folder.name, engine.NO_ANSWER) == engine.NO_ANSWER]
        for family, output in run(missing, mode):
            outputs[family] = output
            record.write_text(json.dumps(found))
            print(f"{name} {family}: {output if isinstance(output, str) else 'served'}", file=sys.stderr)

    add("stock", stock, STOCK, folders)
    for name in modes:
        add(name, serve, MODES[name], folders)
        add(
            f"stock {name}",
            stock,
            MODES["TP=2" if name == "EP=2" else name],
            [
                folder
                for folder in folders
                if found[name][folder.name] != engine.NO_ANSWER
                and not same(folder.name, found[name][folder.name], found["stock"][folder.name])
            ],
        )
    return found


def cell(family: str, mode: str, outputs: dict[str, dict[str, Output]]) -> str:
    """ "yes" if equal to the oracle, "as stock" if only to stock vLLM in the same mode, "vLLM" if that fails too.

    In bf16 "as stock" also if nearer to the oracle than stock vLLM is in that mode. Otherwise "no", or NO_ANSWER if an
    engine took too long.
    """
    if family in NOT_SERVED_HERE:
        return "vLLM"
    oracle, found, alike = outputs["stock"][family], outputs[mode][family], outputs[f"stock {mode}"].get(family)
    if engine.NO_ANSWER in (found, alike, oracle):
        return engine.NO_ANSWER
    if same(family, found, oracle):
        return "yes"
    assert alike is not None  # `measure` asks stock vLLM wherever ours differs
    if isinstance(alike, str):
        return "vLLM"
    is_rounding = (
        family in TOLERANCES
        and not isinstance(found, str)
        and not isinstance(oracle, str)
        and distance(found, oracle) <= distance(alike, oracle)
    )
    return "as stock" if is_rounding or same(family, found, alike) else "no"


def table(families: list[str], modes: list[str], outputs: dict[str, dict[str, Output]]) -> str:
    rows = [["family", "calibrate, export", *modes], ["---"] * (2 + len(modes))]
    rows += [[family, "yes", *(cell(family, mode, outputs) for mode in modes)] for family in families]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.families")
    parser.add_argument("families", nargs="*", default=[*tiny_models.OWN, *QUANTIZED], help="by default all")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--work", type=Path, help="folder that keeps models and outputs, by default a temporary one")
    arguments = parser.parse_args()
    known = [*tiny_models.OWN, *QUANTIZED]
    if unknown := set(arguments.families) - set(known):
        parser.error(f"unknown: {', '.join(sorted(unknown))}; choose from {', '.join(known)}")
    with tempfile.TemporaryDirectory() as temporary:
        work = arguments.work or Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        corpus = tiny_models.write_corpus(work / "text.jsonl")
        folders = [prepare(family, work, corpus) for family in arguments.families]
        outputs = measure(
            [path for path in folders if path.name not in NOT_SERVED_HERE], arguments.modes, work / "outputs.json"
        )
    print(table(arguments.families, arguments.modes, outputs))


if __name__ == "__main__":
    main()
