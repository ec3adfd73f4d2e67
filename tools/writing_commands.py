# SPDX-License-Identifier: Apache-2.0
"""Every command that writes, on a tiny model: how it is called, and what it reads."""

import multiprocessing
from dataclasses import dataclass
from pathlib import Path

from transformers import AutoModelForCausalLM

from heapr_vllm.errors import HeaprError
from heapr_vllm.prune.calibration.record import CalibrationRecord
from heapr_vllm.prune.calibration.saved_state import PARTIAL_FILE
from tests import tiny_models
from tools.heapr_process import fork, wait

IMPORTED_BY_COMMANDS = (
    "heapr_vllm.evaluation.compare",
    "heapr_vllm.model_executor.tuning.search",
    "heapr_vllm.prune.calibration.streamed",
    "heapr_vllm.prune.export.unpacked",
    "heapr_vllm.prune.repair.fit",
    "heapr_vllm.prune.report.plot",
    "matplotlib.backends.backend_agg",
    "transformers.models.qwen3_moe.modeling_qwen3_moe",
)
ENVIRONMENT = {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}  # read by what is imported above


@dataclass(frozen=True)
class Command:
    """One way to write something.

    `arguments`: in a folder that holds what `make_inputs` wrote. `output`: what is written, in the folder beside it.
    `again`: what makes it continue. `before`: an input that lies at the output already. `is_timed`: what it writes
    depends on a clock, so that any output its reader takes counts as whole.
    """

    name: str
    arguments: tuple[str, ...]
    output: str = "out"
    output_option: str = "-o"
    again: tuple[str, ...] = ()
    before: str | None = None
    is_timed: bool = False

    def argv(self, work: Path) -> list[str]:
        return [*self.arguments, self.output_option, str(work / self.output)]

    def refused(self, work: Path) -> bool:
        """Whether the reader of an output says that it is not finished, or there is none to be read."""
        folder = work / self.output
        if self.arguments[0] != "calibrate":
            return False
        if (folder / PARTIAL_FILE).is_file():
            return True
        try:
            CalibrationRecord.read(folder, "")
        except HeaprError:
            return True
        return False


TEXT = ("--dataset", "text.jsonl", "--max-seq-length", "64")
CALIBRATE = ("calibrate", "base", *TEXT, "--num-calibration-samples", "12", "--checkpoint-every", "2")
COMMANDS = (
    Command("calibrate", CALIBRATE, again=("--resume",)),
    Command("calibrate --stream", (*CALIBRATE, "--stream"), again=("--resume",)),
    Command("calibrate --overwrite", (*CALIBRATE[:-1], "100", "--overwrite"), before="calib"),
    Command("prune", ("prune", "calib", "--sparsity", "0.4")),
    Command("prune --overwrite", ("prune", "calib", "--sparsity", "0.4", "--overwrite"), before="masks"),
    Command("prune --quantize", ("prune", "calib", "--sparsity", "0.4", "--quantize", "int8")),
    Command("sweep --plot", ("sweep", "calib", "--ratios", "0.2", "0.4"), "sweep.png", "--plot"),
    Command("inspect --plot", ("inspect", "masks"), "widths.png", "--plot"),
    Command("export", ("export", "masks")),
    Command("export --overwrite", ("export", "masks", "--overwrite"), before="other"),
    Command("export --quantize", ("export", "masks", "--quantize", "int8")),
    Command("unpack", ("unpack", "compact")),
    Command("unpack masks", ("unpack", "masks")),
    Command("export --repair", ("export", "masks", "--repair", "least-squares")),
    Command("eval", ("eval", "masks", *TEXT, "--num-samples", "4"), "eval.json"),
    Command(
        "tune",
        ("tune", "masks", "--tokens", "1", "2", "--time-budget", "5s"),
        "profiles",
        is_timed=True,
    ),
)


def make_inputs(folder: Path) -> None:
    """Writes what the commands read: a model in many shards, text, a calibration, masks and two exports."""
    maker = multiprocessing.get_context("fork").Process(target=_make_base, args=(folder,))
    maker.start()  # the threads that transformers starts are not to be here when this process forks
    maker.join()
    steps = (
        ("calibrate", "base", *TEXT, "--num-calibration-samples", "60", "-o", "calib"),
        ("prune", "calib", "--sparsity", "0.25", "-o", "masks"),
        ("export", "masks", "--layout", "zeroed", "-o", "other"),
        ("export", "masks", "--quantize", "int8", "-o", "compact"),
    )
    for step in steps:
        ended = wait(fork(list(step), folder, folder.parent / "log", {}))
        if ended.status:
            raise RuntimeError(f"heapr {' '.join(step)} ended with {ended.status}: {ended.printed}")


def _make_base(folder: Path) -> None:
    single = tiny_models.save("qwen3_moe", folder / "single")
    AutoModelForCausalLM.from_pretrained(single).save_pretrained(folder / "base", max_shard_size="50KB")
    tiny_models.tokenizer().save_pretrained(folder / "base")
    tiny_models.write_corpus(folder / "text.jsonl")
