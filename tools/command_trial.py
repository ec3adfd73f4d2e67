# SPDX-License-Identifier: Apache-2.0
"""A command on its inputs: what it writes undisturbed, and what it leaves when it is stopped."""

import json
import shutil
import signal
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from heapr_vllm.prune.calibration.record import CALIBRATION_FILE
from tools.heapr_process import Ended, Process, execute, fork, wait
from tools.writing_commands import Command

STOPS = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGKILL: -signal.SIGKILL}
Contents = dict[str, bytes]


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
            from heapr_vllm.model_executor.kernels.triton.tuned_files import read_profiles

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
