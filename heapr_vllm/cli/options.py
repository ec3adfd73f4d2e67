# SPDX-License-Identifier: Apache-2.0
"""Arguments that several commands share, and types of arguments."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

Commands = argparse._SubParsersAction


def add_command(
    commands: Commands, name: str, run: Callable[[argparse.Namespace], None], summary: str, example: str
) -> argparse.ArgumentParser:
    """Adds a subcommand that calls `run` with its parsed arguments."""
    command = commands.add_parser(name, help=summary, description=summary, epilog=f"example: {example}")
    command.add_argument("--debug", action="store_true", help="show the traceback of an error")
    command.set_defaults(run=run)
    return command


def output(
    command: argparse.ArgumentParser, metavar: str, *, required: bool = True
) -> argparse._MutuallyExclusiveGroup:
    """Adds --output and --overwrite; the returned group holds what excludes --overwrite."""
    command.add_argument("-o", "--output", type=Path, required=required, metavar=metavar)
    group = command.add_mutually_exclusive_group()
    group.add_argument("--overwrite", action="store_true", help="replace what heapr wrote there before")
    return group


def dataset(command: argparse.ArgumentParser) -> None:
    """Adds what says which text: the fields of `TextSettings`, which `text` takes out again."""
    command.add_argument(
        "--dataset",
        required=True,
        nargs="+",
        action="extend",
        metavar="SPEC",
        help="a file (.txt, .md, .jsonl, .json, .parquet, also .gz) or name[subset](split), of text or conversations; "
        "several with names and shares make a mix: code=code.jsonl:0.5 chat=chat.jsonl:0.5",
    )
    command.add_argument("--text-column", metavar="NAME", help="field of the records (default: text, messages)")
    command.add_argument("--chat-template", metavar="FILE", help="for conversations, instead of the model's own")
    command.add_argument(
        "--loss", default="all", choices=("all", "assistant"), help="whose tokens of conversations count (default: all)"
    )
    command.add_argument(
        "--max-seq-length",
        type=positive,
        default=2048,
        metavar="L",
        help="tokens of a sample of text; conversations are cut there",
    )
    command.add_argument("--seed", type=integer, default=0)


def text(args: argparse.Namespace) -> dict[str, Any]:
    """The arguments of `dataset` by the names of `TextSettings`; a single spec stays a string."""
    names = ("text_column", "chat_template", "loss", "max_seq_length", "seed")
    datasets = args.dataset
    if args.chat_template is not None:
        args.chat_template = str(Path(args.chat_template).resolve())  # a repair may be asked for elsewhere
    return {"dataset": datasets[0] if len(datasets) == 1 else datasets} | {name: getattr(args, name) for name in names}


def placement(command: argparse.ArgumentParser, devices: str = "cpu, cuda, cuda:1") -> None:
    command.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16"))
    command.add_argument("--device", default="cpu", help=devices)


def selection(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--scope",
        default="global",
        choices=("global", "layer", "expert", "layer-uniform", "uniform"),
        help="where neurons compete (default: global; reap was published with layer); layer-uniform: the experts of a "
        "layer keep equally many, uniform: those of the model do, for `heapr export --layout plain`",
    )
    command.add_argument(
        "--align", "--width-multiple", type=positive, default=16, metavar="A", help="kept counts are multiples of it"
    )
    command.add_argument("--min-width", type=not_negative, default=0, metavar="W", help="neurons every expert keeps")
    command.add_argument(
        "--protect",
        type=float,
        metavar="P",
        help="fraction that super experts (outlier outputs) keep at least (default: 0.5; 0: off)",
    )
    command.add_argument(
        "--unrouted",
        default="keep",
        choices=("keep", "prune", "error"),
        help="experts without a calibration token (default: keep)",
    )
    which = command.add_mutually_exclusive_group()
    which.add_argument(
        "--include-layers", type=layers, metavar="LAYERS", help="prune only these, such as 4-20 or 1,3,8-11"
    )
    which.add_argument("--exclude-layers", type=layers, default=(), metavar="LAYERS", help="leave these whole")
    command.add_argument("--seed", type=integer, default=0, help="for --criterion random")


def layers(text: str) -> frozenset[int]:
    """Parses 1,3,8-11."""
    numbers: set[int] = set()
    for part in text.split(","):
        match = re.fullmatch(r"(\d{1,4})(?:-(\d{1,4}))?", part.strip())
        if match is None:
            raise argparse.ArgumentTypeError(f"{text} is not like 1,3,8-11")
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first:
            raise argparse.ArgumentTypeError(f"{part} ends before it begins")
        numbers.update(range(first, last + 1))
    return frozenset(numbers)


def mix(command: argparse.ArgumentParser) -> argparse._MutuallyExclusiveGroup:
    """Adds --mix to a group that takes other ways to weigh sources too."""
    group = command.add_mutually_exclusive_group()
    group.add_argument(
        "--mix",
        metavar="SHARES",
        help="of tokens of the calibration's sources, such as code=0.7,chat=0.3 (default: as calibrated)",
    )
    return group


def size(text: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text} is not a size such as 34GiB, 800MB or 1000000")
    number, unit, binary = match.groups()
    return int(float(number) * (1024 if binary else 1000) ** " KMGT".index(unit or " "))


def positive(text: str) -> int:
    value = integer(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive integer")
    return value


def not_negative(text: str) -> int:
    value = integer(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{text} is negative")
    return value


def integer(text: str) -> int:
    value = int(text)
    if abs(value) >= 2**63:
        raise argparse.ArgumentTypeError(f"{text} does not fit into 64 bits")
    return value


def json_object(text: str) -> dict[str, Any]:
    value = json.loads(text)
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f'{text} is not a JSON object such as {{"max_model_len": 4096}}')
    return value


def png(text: str) -> Path:
    if Path(text).suffix.lower() not in (".png", ".pdf", ".svg"):
        raise argparse.ArgumentTypeError(f"{text} is not a .png, .pdf or .svg file")
    return Path(text)


def html(text: str) -> Path:
    if Path(text).suffix.lower() not in (".html", ".htm"):
        raise argparse.ArgumentTypeError(f"{text} is not a .html file")
    return Path(text)


def fraction(text: str) -> float:
    value = float(text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not in [0, 1)")
    return value


def duration(text: str) -> float:
    """Seconds."""
    number, unit = (text[:-1], text[-1]) if text[-1:] in ("s", "m", "h") else (text, "s")
    try:
        return float(number) * {"s": 1, "m": 60, "h": 3600}[unit]
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text} is not a time such as 90s, 10m or 1h") from error
