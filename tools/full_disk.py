# SPDX-License-Identifier: Apache-2.0
"""Runs every command that writes on a disk that is too small, and where nothing may be written.

    python -m tools.full_disk --command export prune   # those whose name contains one of these; all by default

The disks are file systems in memory, in a mount namespace of its own, which needs root or user namespaces. Each has
room for a share of what an undisturbed run writes. A command must end with 2 and one line that names the file or folder
and a remedy, leave inputs and an earlier output as they are and nothing else but what it can go on with, and end in
what an undisturbed run writes as soon as there is room. What fits after all must be whole. Exit code 1 if anything is
not so, 3 if nothing can be mounted here.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from contextlib import suppress
from importlib import import_module
from pathlib import Path

from tools.command_trial import Contents, Trial, contents
from tools.writing_commands import COMMANDS, ENVIRONMENT, IMPORTED_BY_COMMANDS, make_inputs

SHARES = (0.0, 0.2, 0.5, 0.8)  # of what is to be written
PAGE = os.sysconf("SC_PAGE_SIZE")
CANNOT_MOUNT = 3
FILLER = "filler"
INSIDE = "INSIDE_NAMESPACE"  # set in the namespace


def mount(folder: Path, size: int, *options: str) -> None:
    """Gives the file system at `folder` another size in bytes, or options, and makes it if it is not there."""
    remount = ["remount"] if os.path.ismount(folder) else []
    chosen = ",".join([*remount, f"size={size}", *options])
    subprocess.run(["mount", "-t", "tmpfs", "-o", chosen, "tmpfs", str(folder)], check=True)


class Disk:
    """A command whose ../work is a file system of its own."""

    def __init__(self, trial: Trial) -> None:
        self.trial = trial
        self.disk = trial.work / "disk"
        self.trial.work = self.disk

    def run(self, share: float | None) -> tuple[str, list[str]]:
        """Runs the command with room for a `share`, or, if that is None, where nothing may be written, and again.

        Returns whether it was "refused" or "fits", and what was wrong.
        """
        trial = self.trial
        self.disk.parent.mkdir(exist_ok=True)
        self.disk.mkdir(exist_ok=True)
        mount(self.disk, 2**30)
        try:
            if trial.command.before:
                shutil.copytree(trial.inputs / trial.command.before, self.disk / trial.command.output)
            used = blocks(trial.earlier)
            size = used + int((share or 0.0) * blocks(trial.whole)) // PAGE * PAGE
            mount(self.disk, max(size, PAGE), *([] if share is not None else ["ro"]))
            if share == 0:
                fill(self.disk / FILLER)
            state, problems = self._tried(share)
            mount(self.disk, 2**30, "rw")
            (self.disk / FILLER).unlink(missing_ok=True)
            problems += trial.again(is_whole=state == "fits")
        finally:
            subprocess.run(["umount", str(self.disk)], check=True)
        return state, problems

    def _tried(self, share: float | None) -> tuple[str, list[str]]:
        trial, problems = self.trial, []
        ended = trial.run()
        state = "refused" if ended.status or not share else "fits"
        lines = [line for line in ended.printed.splitlines() if line.startswith("heapr: ")]
        is_told = ended.status == 2 and len(lines) == 1 and str(self.disk) in lines[0] and ";" in lines[0]
        if state == "refused" and not is_told:
            problems.append(f"exit status {ended.status}: {ended.printed[-1500:]}")
        found = contents(self.disk)
        output = trial.of_output(found)
        if not trial.is_whole(output) and not (state == "refused" and trial.is_unfinished(output)):
            problems.append(f"the output is neither whole nor absent nor unfinished: {sorted(output)}")
        rest = {name for name in found.keys() - output.keys() if name != FILLER and not name.startswith(".out.repair/")}
        if rest:
            problems.append(f"left over: {sorted(rest)}")
        if contents(trial.inputs) != trial.untouched:
            problems.append("inputs changed")
        return state, problems


def fill(file: Path) -> None:
    """Writes until the disk is full."""
    with suppress(OSError), file.open("wb", buffering=0) as stream:
        while True:
            stream.write(bytes(PAGE))


def blocks(found: Contents) -> int:
    """Bytes that files and folders take on the disk."""
    return sum(-(-max(len(data), 1) // PAGE) * PAGE for data in found.values())


def namespace() -> int:
    """Runs this program again where it may mount; returns its exit code."""
    unshare = ["unshare", "--mount"] if os.geteuid() == 0 else ["unshare", "--mount", "--map-root-user"]
    with tempfile.TemporaryDirectory() as folder:
        probe = [*unshare, "mount", "-t", "tmpfs", "tmpfs", folder]
        if not shutil.which("unshare") or subprocess.run(probe, capture_output=True).returncode:
            print("no file system can be mounted here", file=sys.stderr)
            return CANNOT_MOUNT
    command = [*unshare, sys.executable, "-m", "tools.full_disk", *sys.argv[1:]]
    return subprocess.run(command, env={**os.environ, **ENVIRONMENT, INSIDE: "1"}).returncode


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--command", nargs="+", metavar="NAME", help="parts of names")
    args = parser.parse_args()
    if INSIDE not in os.environ:
        return namespace()
    for name in IMPORTED_BY_COMMANDS:
        import_module(name)
    chosen = [each for each in COMMANDS if not args.command or any(part in each.name for part in args.command)]
    columns = [*(f"{share:.0%}" for share in SHARES), "read-only"]
    print(f"| command | KiB | {' | '.join(columns)} |\n|---|--:|{'---|' * len(columns)}", flush=True)
    failed = False
    with tempfile.TemporaryDirectory() as folder:
        make_inputs(Path(folder, "inputs"))
        for command in chosen:
            trial = Trial(command, Path(folder, "inputs"), Path(folder))
            disk = Disk(trial)
            found = [disk.run(share) for share in (*SHARES, None)]
            cells = " | ".join("failed" if problems else state for state, problems in found)
            print(f"| {command.name} | {blocks(trial.whole) // 1024} | {cells} |", flush=True)
            for column, (_, problems) in zip(columns, found, strict=True):
                for problem in problems:
                    print(f"  {column}: {problem}", file=sys.stderr, flush=True)
                    failed = True
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
