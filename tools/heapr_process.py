# SPDX-License-Identifier: Apache-2.0
"""A `heapr` command in a process of its own, which can be stopped: forked from this one, or the real executable."""

import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import NamedTuple

from heapr_vllm.cli.main import main as heapr

PATIENCE = 120  # seconds that a command takes at most, and a stopped one until it is gone


class Process(NamedTuple):
    """A running command, and where its output goes."""

    number: int
    started: float
    log: Path


class Ended(NamedTuple):
    """How a process ended: exit status, negative after a signal; seconds since its start; what it printed."""

    status: int
    seconds: float
    printed: str


def fork(argv: list[str], folder: Path, log: Path, environment: dict[str, str]) -> Process:
    """Starts `heapr ARGV` in `folder` in a copy of this process; returns when that is about to begin."""
    sys.stdout.flush()
    ready, begin = os.pipe()
    number = os.fork()
    if number:
        os.close(begin)
        os.read(ready, 1)
        os.close(ready)
        return Process(number, time.monotonic(), log)
    status = [1]
    try:
        _become(argv, folder, log, environment, begin, status)
    finally:
        os._exit(status[0])


def _become(
    argv: list[str], folder: Path, log: Path, environment: dict[str, str], begin: int, status: list[int]
) -> None:
    """Runs the command in the forked process; its exit status replaces `status[0]`."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for standard in (1, 2):
        os.dup2(descriptor, standard)
    os.chdir(folder)
    os.environ.update(environment)
    tempfile.tempdir = environment.get("TMPDIR")
    try:
        os.write(begin, b"!")
        status[0] = heapr(argv)
    except SystemExit as error:
        status[0] = error.code if isinstance(error.code, int) else 1
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()


def execute(argv: list[str], folder: Path, log: Path, environment: dict[str, str]) -> Process:
    """Starts the real executable."""
    root = str(Path(__file__).parent.parent)
    started = time.monotonic()
    with log.open("w") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "heapr_vllm", *argv],
            cwd=folder,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, **environment, "PYTHONPATH": root},
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
    process.returncode = 0  # waited for below
    return Process(process.pid, started, log)


def wait(process: Process, stop: signal.Signals | None = None, after: float = 0.0) -> Ended:
    """Waits for the end of a process, and sends `stop` when it has run for `after` seconds; kills one that hangs."""
    deadline = process.started + (after if stop else PATIENCE)
    while True:
        found, status = os.waitpid(process.number, os.WNOHANG)
        now = time.monotonic()
        if found:
            return Ended(os.waitstatus_to_exitcode(status), now - process.started, process.log.read_text())
        if now >= deadline:
            os.kill(process.number, stop or signal.SIGKILL)
            stop, deadline = None, now + PATIENCE  # what is still there then hangs
        time.sleep(min(0.001, max(0.0, deadline - now)))
