# SPDX-License-Identifier: Apache-2.0
"""Which families work how: every family's tiny model through every way of serving it, against stock vLLM.

    python -m tests.model_executor.families          # all families and modes, as the README's table
    python -m tests.model_executor.families mixtral  # one

The oracle is stock vLLM on the checkpoint with the pruned neurons zeroed, in fp32 on the CPU.
"""

import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from heapr_vllm.prune import CalibrationSettings, NeuronMoments, calibrate, export_checkpoint, write_masks_repository
from tests import tiny_models
from tests.conftest import awkward
from tests.model_executor import engine

ENVIRONMENT = {"HEAPR_CPU_BUCKETS": "always", "VLLM_MLA_DISABLE": "1"}  # the CPU's MLA is half precision only
TWO = {"VLLM_CPU_OMP_THREADS_BIND": "0|1", "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
CONFIG_FROM_PLUGIN = ("deepseek",)  # vLLM has the model, but nobody has the config
NOT_SERVED_HERE = {"qwen3_5_moe": "vLLM's model imports torchvision, which has no CPU build here"}


class Mode(NamedTuple):
    """`folder`: of the pruned model; the rest goes to `vllm.LLM` and into the environment."""

    folder: str
    arguments: dict[str, Any]
    env: dict[str, str] = {}


MODES = {
    "compact": Mode("compact", {}),
    "masks": Mode("masks", {"load_format": "heapr"}),
    "TP=2": Mode("compact", {"tensor_parallel_size": 2}, TWO),
    "PP=2": Mode("compact", {"pipeline_parallel_size": 2}, TWO),
    "EP=2": Mode("compact", {"tensor_parallel_size": 2, "enable_expert_parallel": True}, TWO),
    "compile": Mode("compact", {"enforce_eager": False}),
}


def prepare(family: str, folder: Path, corpus: Path, edit_base: Callable[[Path], None] = lambda base: None) -> Path:
    """Base model, calibration, masks with widths 0, 1, odd and full, and both checkpoints of `family`."""
    base = tiny_models.save(family, folder / family / "base")
    edit_base(base)
    work = base.parent
    calibrate(CalibrationSettings(str(base), str(corpus), num_calibration_samples=4, max_seq_length=64), work / "calib")
    write_masks_repository(awkward(NeuronMoments.from_pretrained(work / "calib")), work / "calib", work / "masks")
    export_checkpoint(work / "masks", work / "compact")
    export_checkpoint(work / "masks", work / "masked", layout="masked")
    return work


def serve(folders: list[Path], mode: Mode) -> list[dict | None]:
    """Output of every model in one process; None for one that fails, with the reason on standard error."""
    return engine.generate_many([folder / mode.folder for folder in folders], env=ENVIRONMENT | mode.env,
                                **mode.arguments)


def stock(folders: list[Path]) -> list[dict | None]:
    """The same from vLLM's own experts on the zeroed checkpoints, without the plugin unless its config is needed."""
    found: dict[Path, dict | None] = {}
    for needed, env in ((False, {"VLLM_PLUGINS": ""}), (True, {})):
        part = [folder for folder in folders if (folder.name in CONFIG_FROM_PLUGIN) == needed]
        outputs = engine.generate_many([folder / "masked" for folder in part], env=ENVIRONMENT | env) if part else []
        found |= dict(zip(part, outputs, strict=True))
    return [found[folder] for folder in folders]


def same(found: dict | None, expected: dict | None) -> bool:
    """Whether greedy ids are equal and prompt logprobs within 1e-4."""
    if not found or not expected or found["ids"] != expected["ids"]:
        return False
    return all(abs(a - b) < 1e-4 for logprobs, wanted in zip(found["logprobs"], expected["logprobs"], strict=True)
               for a, b in zip(logprobs, wanted, strict=True))


def main() -> None:
    families = sys.argv[1:] or list(tiny_models.OWN)
    served = [family for family in families if family not in NOT_SERVED_HERE]
    folder = Path(tempfile.mkdtemp())
    try:
        corpus = tiny_models.write_corpus(folder / "text.jsonl")
        folders = {family: prepare(family, folder, corpus) for family in families}
        expected = dict(zip(served, stock([folders[family] for family in served]), strict=True))
        print(f"| family | calibrate, export | {' | '.join(MODES)} |\n|---|{'---|' * (1 + len(MODES))}")
        cells = {family: ["yes"] for family in families}
        for mode in MODES.values():
            for family, found in zip(served, serve([folders[family] for family in served], mode), strict=True):
                cells[family].append("yes" if same(found, expected[family]) else "no")
        for family in families:
            row = cells[family] if family in served else ["yes", *["-"] * len(MODES)]
            print(f"| {family} | {' | '.join(row)} |")
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
