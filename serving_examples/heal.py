# SPDX-License-Identifier: Apache-2.0
"""Heals a pruned model: trains a part of it to predict what the dense model predicts (docs/healing.md).

    python -m serving_examples.heal masks --dataset train.jsonl -o healed
    vllm serve masks --load-format heapr --enable-lora --max-lora-rank 16 \\
        --lora-target-modules q_proj k_proj v_proj o_proj --lora-modules healed=healed

    python -m serving_examples.heal pruned --dataset train.jsonl --into weights --dtype float32 -o healed
    heapr export masks --model healed --no-verify -o healed-pruned
"""

import argparse
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

from heapr_vllm.cli import options
from heapr_vllm.errors import HeaprError
from serving_examples.healing.heal import heal
from serving_examples.healing.settings import ATTENTION, LEARNING_RATES, HealingSettings
from serving_examples.healing.student import PARTS


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m serving_examples.heal",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("pruned", type=Path, metavar="MASKS_OR_COMPACT")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="DIR")
    parser.add_argument("--model", metavar="BASE", help="base model, if it is not where it was calibrated")
    parser.add_argument("--into", default="adapter", choices=LEARNING_RATES, help="default: adapter")
    options.dataset(parser)
    parser.add_argument("--num-samples", type=options.positive, default=1024, metavar="N", help="default: 1024")
    parser.add_argument("--batch-size", type=options.positive, default=4, metavar="B", help="default: 4")
    parser.add_argument("--epochs", type=options.positive, default=1, metavar="N", help="default: 1")
    parser.add_argument("--learning-rate", type=float, metavar="LR", help=f"default: {LEARNING_RATES}")
    parser.add_argument("--rank", type=options.positive, default=16, metavar="R", help="of the adapter (default: 16)")
    parser.add_argument(
        "--target-modules",
        nargs="+",
        default=ATTENTION,
        metavar="NAME",
        help=f"what the adapter is on (default: {' '.join(ATTENTION)})",
    )
    parser.add_argument(
        "--parts",
        nargs="+",
        default=tuple(PARTS),
        choices=PARTS,
        help="what --into weights trains (default: all of them)",
    )
    parser.add_argument("--top-k", type=options.positive, default=64, metavar="K", help="default: 64")
    parser.add_argument("--cache", metavar="DIR", help="keep the dense model's log-probabilities there, and take them")
    parser.add_argument("--gradient-checkpointing", action="store_true", help="a third slower, for much less memory")
    options.placement(parser, "cpu or cuda")
    return parser


def settings_of(args: argparse.Namespace) -> HealingSettings:
    """Takes the arguments of `HealingSettings` out of all."""
    names = {field.name for field in fields(HealingSettings)}
    chosen: dict[str, Any] = {name: value for name, value in vars(args).items() if name in names}
    chosen |= {**options.text(args), "target_modules": tuple(args.target_modules), "parts": tuple(args.parts)}
    return HealingSettings(**chosen)


def main() -> int:
    """Returns the exit code: 0, or 2 for a mistake the user can fix."""
    args = build_parser().parse_args()
    try:
        print(heal(args.pruned, args.output, settings_of(args), model=args.model))
    except HeaprError as error:
        print(f"heal: error: {error}", file=sys.stderr)
        return 2
    print(f"wrote {args.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
