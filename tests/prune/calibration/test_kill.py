# SPDX-License-Identifier: Apache-2.0
"""SIGKILL at random points of calibration and export: continued, they write the files of an undisturbed run.

HEAPR_KILLS sets the number of kills per command, 3 by default.
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from heapr_vllm.cli.main import main
from heapr_vllm.prune.calibration.record import CALIBRATION_FILE
from heapr_vllm.prune.calibration.saved_state import PARTIAL_FILE
from tests import tiny_models

KILLS = int(os.environ.get("HEAPR_KILLS", "3"))


@pytest.fixture(scope="module")
def base(qwen3: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`qwen3` in many small shards."""
    path = tmp_path_factory.mktemp("sharded") / "base"
    AutoModelForCausalLM.from_pretrained(qwen3).save_pretrained(path, max_shard_size="50KB")
    tiny_models.tokenizer().save_pretrained(path)
    return path


@pytest.mark.slow
@pytest.mark.parametrize("options", [["--stream"], []], ids=["streamed", "in memory"])
@pytest.mark.parametrize("is_mix", [False, True], ids=["one source", "mix"])
def test_killed_calibration(is_mix: bool, options: list[str], base: Path, corpus: Path, tmp_path: Path) -> None:
    dataset = [f"first={corpus}:0.6", f"second={corpus}:0.4"] if is_mix else [str(corpus)]
    command = [
        "calibrate",
        str(base),
        "--dataset",
        *dataset,
        "--num-calibration-samples",
        "60",
        "--max-seq-length",
        "64",
        "--checkpoint-every",
        "3",
        *options,
    ]
    kill_and_continue(command, ["--resume"], lambda output: (output / PARTIAL_FILE).exists(), tmp_path)


@pytest.mark.slow
def test_killed_export(base: Path, masks_repository: Path, tmp_path: Path) -> None:
    command = ["export", str(masks_repository), "--model", str(base), "--no-verify"]
    kill_and_continue(command, ["--overwrite"], lambda output: any(output.parent.glob(".out.partial.*")), tmp_path)


def kill_and_continue(command: list[str], again: list[str], begun: Callable[[Path], bool], folder: Path) -> None:
    """Kills `command` KILLS times, once before its work has `begun` and then spread over its work.

    After each kill the command with the arguments `again` must leave the files of an undisturbed run and nothing else.
    """
    rng, killed = random.Random(5), 0
    start, work = run(command, folder / "whole" / "out", begun)
    wanted = files(folder / "whole")
    for number in range(3 * KILLS):
        output = folder / f"killed{number}" / "out"
        delay = (killed - 1 + rng.random()) / max(1, KILLS - 1) * work
        ended = run(command, output, begun, rng.random() * start if killed == 0 else None, delay)
        assert main([*command, "-o", str(output), *again]) == 0
        assert files(output.parent) == wanted
        if ended is None:
            killed += 1
        else:  # the machine is faster now than it was at first
            work = min(work, ended[1])
        if killed == KILLS:
            return
    pytest.fail(f"only {killed} of {3 * KILLS} runs were still there to be killed")


def run(
    command: list[str],
    output: Path,
    begun: Callable[[Path], bool],
    after_start: float | None = None,
    after_begin: float = float("inf"),
) -> tuple[float, float] | None:
    """Seconds before and after the work had begun, or None if the process was killed.

    It is killed `after_start` seconds after its start, or `after_begin` seconds after its work has begun.
    """
    output.parent.mkdir()
    started = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, "-m", "heapr_vllm", *command, "-o", str(output)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    begin = None
    while process.poll() is None:
        now = time.monotonic()
        begin = now if begin is None and begun(output) else begin
        if now > started + (after_start or float("inf")) or (begin is not None and now > begin + after_begin):
            process.send_signal(signal.SIGKILL)
        time.sleep(0.001)
    if process.returncode == -signal.SIGKILL:
        return None
    assert process.returncode == 0 and begin is not None
    return begin - started, time.monotonic() - begin


def files(folder: Path) -> dict[str, bytes | dict]:
    """Contents of all files, without the time that calibration.json records."""
    contents = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    for name in contents:
        if name.endswith(CALIBRATION_FILE):
            contents[name] = {
                key: value for key, value in json.loads(contents[name]).items() if key != "wall_time_seconds"
            }
    return contents
