# SPDX-License-Identifier: Apache-2.0
"""The engine's process: what it is called by, and that nothing of it outlives the command."""

import os
import signal
import subprocess
import threading
import time
from pathlib import Path

import pytest

from heapr_vllm.errors import HeaprError
from heapr_vllm.evaluation import served
from heapr_vllm.evaluation.predictions import PredictionsFolder
from heapr_vllm.evaluation.settings import EvaluationSettings
from heapr_vllm.formats.checkpoint import Checkpoint
from heapr_vllm.prune.text.samples import Samples


def test_nothing_is_imported_from_where_it_is_called(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands: list[list[str]] = []
    monkeypatch.setattr(served, "run_alone", lambda command, errors: commands.append(command) or errors.touch())
    with pytest.raises(HeaprError, match="no output"):
        settings = EvaluationSettings(dataset="")
        served.run_served(Checkpoint(tmp_path), Samples([]), [], PredictionsFolder(tmp_path), settings, None)
    (tmp_path / "json.py").write_text("raise SystemExit(7)")
    monkeypatch.chdir(tmp_path)
    (command,) = commands
    assert subprocess.run([*command[: command.index("-m")], "-c", "import json"]).returncode == 0


def test_an_interruption_ends_all_processes(tmp_path: Path) -> None:
    """The engine's own processes must not keep the device after Ctrl-C."""

    def interrupt() -> None:
        while not (tmp_path / "pid").is_file() or not (tmp_path / "pid").read_text().endswith("\n"):
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGALRM)

    before = signal.signal(signal.SIGALRM, signal.default_int_handler)
    try:
        threading.Thread(target=interrupt).start()
        with pytest.raises(KeyboardInterrupt):
            served.run_alone(["sh", "-c", f"sleep 60 & echo $! > {tmp_path}/pid; wait"], tmp_path / "errors")
    finally:
        signal.signal(signal.SIGALRM, before)
    deadline = time.monotonic() + 5
    while is_running(int((tmp_path / "pid").read_text())):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def is_running(process: int) -> bool:
    status = Path(f"/proc/{process}/stat")
    return status.exists() and status.read_text().rpartition(")")[2].split()[0] != "Z"
