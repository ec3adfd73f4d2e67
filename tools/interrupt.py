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
import os
import random
import signal
import sys
import tempfile
from collections import Counter
from importlib import import_module
from pathlib import Path

from tools.command_trial import Trial
from tools.heapr_process import execute, fork
from tools.writing_commands import COMMANDS, ENVIRONMENT, IMPORTED_BY_COMMANDS, make_inputs

STARTUP_SECONDS = 4.0


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
