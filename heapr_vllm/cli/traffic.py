# SPDX-License-Identifier: Apache-2.0
"""`heapr traffic`: is the calibration text like what a server is asked?

Imports of torch and transformers sit inside the functions: `heapr --help` must not wait for them.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from heapr_vllm.cli import options


def add_traffic(commands: options.Commands) -> None:
    """Adds `heapr traffic`."""
    command = options.add_command(
        commands,
        "traffic",
        run_traffic,
        "how a calibration's text differs from a server's traffic, and the mix that is nearest",
        "heapr traffic calib traffic",
    )
    command.add_argument("calibration", type=Path, metavar="CALIB")
    command.add_argument("traffic", type=Path, metavar="TRAFFIC", help="what HEAPR_TRAFFIC named when `vllm serve` ran")
    command.add_argument("--json", action="store_true")


def run_traffic(args: argparse.Namespace) -> None:
    from heapr_vllm.formats.traffic import Traffic
    from heapr_vllm.prune.calibration.moments import NeuronMoments
    from heapr_vllm.prune.report.traffic_match import format_match, match_traffic

    match = match_traffic(NeuronMoments.from_pretrained(args.calibration), Traffic.load(args.traffic))
    print(json.dumps(match.to_dict(), indent=2) if args.json else format_match(match))
