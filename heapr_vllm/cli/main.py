# SPDX-License-Identifier: Apache-2.0
"""The `heapr` command."""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import threading
from collections.abc import Generator
from contextlib import contextmanager

from heapr_vllm import __version__
from heapr_vllm.cli import options
from heapr_vllm.cli.calibrate import add_calibrate, run_calibrate
from heapr_vllm.cli.evaluate import add_eval
from heapr_vllm.cli.export import add_export, add_unpack
from heapr_vllm.cli.masks import add_masks
from heapr_vllm.cli.prune import add_inspect, add_prune, add_sweep
from heapr_vllm.cli.push import add_push
from heapr_vllm.cli.refusals import refusal
from heapr_vllm.cli.report import add_report
from heapr_vllm.cli.traffic import add_traffic
from heapr_vllm.cli.tune import add_tune
from heapr_vllm.errors import HeaprError, first_line

NO_PROGRESS_BARS = {  # of other libraries, which read these when they are imported; ours look at stderr themselves
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
}

COMMANDS = (
    add_calibrate,
    add_prune,
    add_sweep,
    add_masks,
    add_traffic,
    add_export,
    add_unpack,
    add_inspect,
    add_eval,
    add_report,
    add_push,
    add_tune,
)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="heapr", description="HEAPr expert pruning for Mixture-of-Experts models.")
    parser.add_argument("--version", action="version", version=f"heapr-vllm {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for add in COMMANDS:
        add(commands)
    options.add_command(commands, "env", run_env, "versions and hardware as JSON, for bug reports", "heapr env")
    return parser


def run_env(args: argparse.Namespace) -> None:
    from heapr_vllm.environment import report

    print(json.dumps(report(), indent=2))


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code: 0, 2 for a mistake the user can fix, 1 for one of ours, 130 after Ctrl-C, 143 if killed.

    HEAPR_DEBUG=1 or --debug lets exceptions through, with their traceback.
    """
    args = argparse.Namespace(debug=False, run=None)
    stops: list[int] = []
    try:
        with _stopped_by_signals(stops):
            args = build_parser().parse_args(argv)
            os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
            if not sys.stderr.isatty():
                for name, value in NO_PROGRESS_BARS.items():
                    os.environ.setdefault(name, value)
            args.run(args)
    except BaseException as error:
        if stops or isinstance(error, KeyboardInterrupt):
            number = stops[0] if stops else signal.SIGINT
            hint = "; --resume continues" if args.run is run_calibrate else ""
            print(f"heapr: {'interrupted' if number == signal.SIGINT else 'terminated'}{hint}", file=sys.stderr)
            return 128 + number
        if not isinstance(error, Exception) or _is_debugging(args):
            raise
        return _told(error, args)
    return 0


def _told(error: Exception, args: argparse.Namespace) -> int:
    """Prints an error in one line, and returns the exit code."""
    if isinstance(error, HeaprError):
        if os.environ.get("LOCAL_RANK", "0") == "0":  # of a node's processes with the same mistake one says so
            print(f"heapr: error: {error}", file=sys.stderr)
        return 2
    if message := refusal(error, args):
        print(f"heapr: error: {message}{'; --resume continues' if args.run is run_calibrate else ''}", file=sys.stderr)
        return 2
    if isinstance(error, OSError | UnicodeError):
        print(f"heapr: error: {type(error).__name__}: {first_line(error)}", file=sys.stderr)
        return 2
    print(
        f"heapr: unexpected {type(error).__name__}: {first_line(error)}. Please report it, with the output of "
        "`heapr env` and of the same command with HEAPR_DEBUG=1",
        file=sys.stderr,
    )
    return 1


def _is_debugging(args: argparse.Namespace) -> bool:
    return args.debug or os.environ.get("HEAPR_DEBUG", "0") not in ("", "0")


@contextmanager
def _stopped_by_signals(stops: list[int]) -> Generator[None]:
    """Lets SIGTERM and SIGHUP end the command as Ctrl-C does, so that temporaries go, and notes in `stops` which came.

    The exception by which it ends may reach us as another one: libraries that import or compile something make their
    own of any that they meet.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(number: int, frame: object) -> None:
        stops.append(number)
        sys.unraisablehook = lambda _: None  # objects that were half made complain when they go
        raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(128 + number)

    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
    for number in (signal.SIGINT, signal.SIGHUP):
        if before[number] is signal.SIG_IGN:  # a job in the background, or under nohup
            del before[number]
    for number in before:
        signal.signal(number, end)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
