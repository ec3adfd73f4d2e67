# SPDX-License-Identifier: Apache-2.0
"""`heapr push`: pruned models to the Hub.

Imports of torch and transformers sit inside the functions: `heapr --help` must not wait for them.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from heapr_vllm.cli import options


def add_push(commands: options.Commands) -> None:
    """Adds `heapr push`."""
    command = options.add_command(
        commands,
        "push",
        run_push,
        "a masks repository or an exported checkpoint to the Hub",
        "heapr push pruned you/model-pruned --private",
    )
    command.add_argument("directory", type=Path, metavar="DIR", help="masks repository or exported checkpoint")
    command.add_argument("repository", metavar="REPO", help="you/model; made if there is none")
    command.add_argument("--private", action="store_true", help="make it private; one that is there stays as it is")


def run_push(args: argparse.Namespace) -> None:
    from heapr_vllm.prune.export.push import push

    print(push(args.directory, args.repository, private=args.private))
