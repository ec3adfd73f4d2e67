# SPDX-License-Identifier: Apache-2.0
"""Two real commands at once on one output: one wins, the other says so, and what is there is whole."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from heapr_vllm.cli.main import main
from tests.prune.calibration.test_kill import files

pytestmark = pytest.mark.long

PAUSED = (  # until a line comes on standard input, in the middle of its work
    "import signal, sys; from heapr_vllm.cli.main import main; import {module} as module; real = module.{name}\n"
    "def paused(*a, **k):\n"
    "    print('writing', flush=True); module.{name} = real; sys.stdin.readline(); return real(*a, **k)\n"
    "module.{name} = paused; sys.exit(main(sys.argv[1:]))"
)
EXPORT = PAUSED.format(module="heapr_vllm.prune.export.shards", name="save_file")
CALIBRATE = PAUSED.format(module="heapr_vllm.prune.calibration.calibrate", name="calibrate_in_memory")


def start(script: str, argv: list[str]) -> subprocess.Popen:
    """A command that has come as far as where its script pauses it, or has ended."""
    process = subprocess.Popen(
        [sys.executable, "-c", script, *argv],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert process.stdout is not None
    process.stdout.readline()
    return process


def finish(process: subprocess.Popen) -> tuple[int, str]:
    """Lets it go on to its end; exit code, and the last line of its errors."""
    _, errors = process.communicate("go on\n", timeout=120)
    return process.returncode, (errors.splitlines() or [""])[-1]


@pytest.mark.parametrize("winner", [0, 1])
def test_exports(winner: int, masks_repository: Path, tmp_path: Path) -> None:
    """Both are in the middle of writing; which one ends first does not depend on which one began first."""
    assert main(["export", str(masks_repository), "-o", str(tmp_path / "alone" / "out")]) == 0
    argv = ["export", str(masks_repository), "-o", str(tmp_path / "both" / "out")]
    processes = [start(EXPORT, argv) for _ in range(2)]
    assert finish(processes[winner])[0] == 0
    status, message = finish(processes[1 - winner])
    assert status == 2 and message.startswith(f"heapr: error: {tmp_path / 'both' / 'out'} already exists; pass")
    assert files(tmp_path / "both") == files(tmp_path / "alone")


def test_calibrations(qwen3: Path, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """They would share the sums so far; with other settings, or --overwrite, or to continue the first one."""
    common = ["calibrate", str(qwen3), "--dataset", str(corpus), "--max-seq-length", "64"]
    argv = [*common, "--num-calibration-samples", "2", "-o", str(tmp_path / "both" / "out")]
    assert main([*argv[:-1], str(tmp_path / "alone" / "out")]) == 0
    first = start(CALIBRATE, argv)
    for more in ([], ["--overwrite"], ["--resume"]):
        assert main([*argv, *more]) == 2
        assert f"another command is writing {tmp_path / 'both' / 'out'}; wait until" in capsys.readouterr().err
    assert finish(first)[0] == 0
    assert files(tmp_path / "both") == files(tmp_path / "alone")
