# SPDX-License-Identifier: Apache-2.0
"""Stops every command that writes at random moments, and looks at what it leaves: `python -m tools.interrupt`.

    python -m tools.interrupt --moments 50                          # all commands, SIGINT and SIGTERM in turn
    python -m tools.interrupt --moments 50 --command export prune   # those whose name contains one of these

Each command runs once undisturbed on a tiny model. Then it is stopped at `--moments` moments between its start and its
end, killed at a fifth as many, and stopped during the start-up of the real executable at `--startups` moments. The
others are processes forked from this one, which has imported everything, so that no moment costs seconds of imports.

After each: the exit code is 130 or 143, or what a shell shows as such, or 0 if it had finished; there is no traceback;
inputs are as before; the output is not there, what it was before, what an undisturbed run writes, or unfinished and
refused by its reader; and the same command, with --resume where there is one, ends in what an undisturbed run leaves,
temporaries included: there are none. Exit code 1 if anything is not so.
"""

import argparse
import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

from transformers import AutoModelForCausalLM

from heapr_vllm.cli.main import main as heapr
from heapr_vllm.errors import HeaprError
from heapr_vllm.prune.calibration.record import CALIBRATION_FILE, CalibrationRecord
from heapr_vllm.prune.calibration.saved_state import PARTIAL_FILE
from tests import tiny_models

IMPORTED_BY_COMMANDS = (
    "heapr_vllm.evaluation.compare",
    "heapr_vllm.model_executor.tuning.search",
    "heapr_vllm.prune.calibration.streamed",
    "heapr_vllm.prune.export.checkpoint",
    "heapr_vllm.prune.repair.fit",
    "heapr_vllm.prune.report.plot",
    "matplotlib.backends.backend_agg",
    "transformers.models.qwen3_moe.modeling_qwen3_moe",
)
ENVIRONMENT = {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}  # read by what is imported above
STOPS = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGKILL: -signal.SIGKILL}
PATIENCE = 120  # seconds that a command takes at most, and a stopped one until it is gone
STARTUP_SECONDS = 4.0
Contents = dict[str, bytes]


@dataclass(frozen=True)
class Command:
    """One way to write something.

    `arguments`: in a folder that holds what `make_inputs` wrote; the output goes to ../work/`output`.
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
    Command("export --repair", ("export", "masks", "--repair", "least-squares")),
    Command("eval", ("eval", "masks", *TEXT, "--num-samples", "4"), "eval.json"),
    Command(
        "tune",
        ("tune", "masks", "--tokens", "1", "2", "--time-budget", "5s"),
        "profiles",
        is_timed=True,
    ),
)


class Ended(NamedTuple):
    """How a process ended: exit status, negative after a signal; seconds since its start; what it printed."""

    status: int
    seconds: float
    printed: str


def make_inputs(folder: Path) -> None:
    """Writes what the commands read: a model in many shards, text, a calibration, masks and another export."""
    maker = multiprocessing.get_context("fork").Process(target=_make_base, args=(folder,))
    maker.start()  # the threads that transformers starts are not to be here when this process forks
    maker.join()
    steps = (
        ("calibrate", "base", *TEXT, "--num-calibration-samples", "60", "-o", "calib"),
        ("prune", "calib", "--sparsity", "0.25", "-o", "masks"),
        ("export", "masks", "--layout", "zeroed", "-o", "other"),
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


class Process(NamedTuple):
    """A running command, and where its output goes."""

    number: int
    started: float
    log: Path


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


def contents(folder: Path) -> Contents:
    """Every file and, as "name/", every folder; calibration.json without the seconds that it took."""
    found = {}
    for path in folder.rglob("*"):
        name = str(path.relative_to(folder))
        if path.is_dir():
            found[f"{name}/"] = b""
            continue
        found[name] = path.read_bytes()
        if path.name == CALIBRATION_FILE:
            with suppress(ValueError):  # half of one, in a temporary of a killed process
                found[name] = json.dumps({**json.loads(found[name]), "wall_time_seconds": 0}).encode()
    return found


@dataclass
class Trial:
    """One command on its inputs: the undisturbed run, then stops. Raises RuntimeError if that one fails."""

    command: Command
    inputs: Path
    scratch: Path

    def __post_init__(self) -> None:
        self.untouched = contents(self.inputs)
        self.work = self.scratch / "work"
        self._prepare()
        self.earlier = contents(self.work)
        ended = self.run()
        if ended.status:
            raise RuntimeError(f"{self.command.name} ended with {ended.status}: {ended.printed}")
        self.seconds, self.whole = ended.seconds, contents(self.work)

    def stop(self, start: Callable[..., Process], number: signal.Signals, after: float) -> tuple[str, list[str], bool]:
        """Stops the command once and runs it again.

        Returns whether it was stopped "before" it wrote anything, "during" that, or had "finished"; what is wrong; and
        whether a temporary was left for the next run.
        """
        self._prepare()
        was = self._changes()
        ended = self.run(start, number, after)
        found, problems = contents(self.work), []
        is_python = start is execute and "/heapr_vllm/" not in ended.printed  # stopped before any of our lines ran
        if ended.status == 0:
            state = "finished"
            self.seconds = min(self.seconds, ended.seconds)  # the machine may have been busy before
        else:
            state = "before" if self._changes() == was else "during"
            # -number: it dies of the signal before it can handle it
            if ended.status not in (STOPS[number], -number) and not is_python:
                problems.append(f"exit status {ended.status}: {ended.printed[-1500:]}")
        if "Traceback" in ended.printed and not is_python:
            problems.append(f"a traceback: {ended.printed[-1500:]}")
        if number != signal.SIGKILL and any((self.scratch / "tmp").iterdir()):
            problems.append("something is left in TMPDIR")
        output = self.of_output(found)
        if not self.is_whole(output) and not self.is_unfinished(output):
            problems.append(f"the output is neither whole nor absent nor refused: {sorted(output)}")
        is_left = bool(found.keys() - output.keys())
        if start is fork or problems:
            problems += self.again(is_whole=output == self.of_output(self.whole))
        if contents(self.inputs) != self.untouched:
            problems.append("inputs changed")
        return state, problems, is_left

    def is_whole(self, output: Contents) -> bool:
        """Whether what is under the final name is nothing, what it was before, or what an undisturbed run writes."""
        if self.command.is_timed:
            from heapr_vllm.model_executor.kernels.triton.tiles import read_profiles

            profiles = [self.work / name for name in output if name.endswith(".json")]
            return all(isinstance(read_profiles(path), list) for path in profiles)
        wanted = (self.of_output(each) for each in (self.earlier, self.whole))
        return not output or output in wanted

    def again(self, is_whole: bool) -> list[str]:
        """Runs the command again, and says what is wrong then; where its output is whole it may say so."""
        ended = self.run(is_again=True)
        is_refused = is_whole and ended.status == 2 and "already exists" in ended.printed
        if ended.status and not is_refused:
            return [f"the next run ended with {ended.status}: {ended.printed[-1500:]}"]
        found = contents(self.work)
        if self.command.is_timed:
            return [] if found.keys() == self.whole.keys() else [f"the next run left {sorted(found)}"]
        wrong = sorted(name for name in found.keys() | self.whole.keys() if found.get(name) != self.whole.get(name))
        return [f"after the next run these differ from an undisturbed one's: {wrong}"] if wrong else []

    def of_output(self, found: Contents) -> Contents:
        """What is under the final name."""
        output = self.command.output
        return {
            name: data for name, data in found.items() if name.rstrip("/") == output or name.startswith(f"{output}/")
        }

    def is_unfinished(self, output: Contents) -> bool:
        """Whether there is something under the final name that its reader does not take."""
        return bool(output) and self.command.refused(self.work)

    def _changes(self) -> dict[Path, int]:
        """When something came or went in the folders where output is."""
        return {path: path.stat().st_mtime_ns for path in (self.work, *self.work.rglob("*/"))}

    def _prepare(self) -> None:
        for folder in (self.work, self.scratch / "tmp"):
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
        if self.command.before:
            shutil.copytree(self.inputs / self.command.before, self.work / self.command.output)

    def run(
        self,
        start: Callable[..., Process] = fork,
        number: signal.Signals | None = None,
        after: float = 0.0,
        is_again: bool = False,
    ) -> Ended:
        """Runs the command to its end, or stops it."""
        argv = self.command.argv(self.work) + (list(self.command.again) if is_again else [])
        environment = {"TMPDIR": str(self.scratch / "tmp")}
        return wait(start(argv, self.inputs, self.scratch / "log", environment), number, after)


def rows(trial: Trial, moments: int, startups: int) -> list[tuple[str, int, Counter[str], list[str]]]:
    """How the command was stopped, how often, what state it was in, and what was wrong."""
    rng = random.Random(trial.command.name)
    stops = [signal.SIGINT, signal.SIGTERM]
    plans = (
        ("SIGINT, SIGTERM", fork, stops, moments),
        ("SIGKILL", fork, [signal.SIGKILL], -(-moments // 5)),
        ("start-up", execute, stops, startups),
    )
    found = []
    for name, start, numbers, count in plans:
        states: Counter[str] = Counter()
        problems: list[str] = []
        for turn in range(count):
            after = rng.uniform(0, trial.seconds if start is fork else STARTUP_SECONDS)
            state, wrong, is_left = trial.stop(start, numbers[turn % len(numbers)], after)
            states.update([state, *(["left"] if is_left else [])])
            problems += [f"{numbers[turn % len(numbers)].name} after {after:.3f} s: {each}" for each in wrong]
        if count:
            found.append((name, count, states, problems))
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--moments", type=int, default=50, help="per command")
    parser.add_argument("--startups", type=int, default=4, help="per command")
    parser.add_argument("--command", nargs="+", metavar="NAME", help="parts of names")
    args = parser.parse_args()
    if any(os.environ.get(name) != value for name, value in ENVIRONMENT.items()):
        os.execve(sys.executable, [sys.executable, "-m", "tools.interrupt", *sys.argv[1:]], os.environ | ENVIRONMENT)
    for name in IMPORTED_BY_COMMANDS:
        import_module(name)
    chosen = [each for each in COMMANDS if not args.command or any(part in each.name for part in args.command)]
    failed = False
    print("| command | seconds | stopped by | moments | before | during | finished | left over | failures |")
    print("|---|--:|---|--:|--:|--:|--:|--:|--:|", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        inputs = Path(folder, "inputs")
        make_inputs(inputs)
        for command in chosen:
            try:
                trial = Trial(command, inputs, Path(folder))
            except RuntimeError as error:
                print(f"  {error}", file=sys.stderr, flush=True)
                failed = True
                continue
            for by, count, states, problems in rows(trial, args.moments, args.startups):
                numbers = " | ".join(str(states[state]) for state in ("before", "during", "finished", "left"))
                row = f"| {command.name} | {trial.seconds:.2f} | {by} | {count} | {numbers} | {len(problems)} |"
                print(row, flush=True)
                for problem in problems:
                    print(f"  {problem}", file=sys.stderr, flush=True)
                failed |= bool(problems)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
