# SPDX-License-Identifier: Apache-2.0
"""Pruned models to the Hub, as `hf upload` would send them, but whole ones only."""

from __future__ import annotations

from pathlib import Path

from heapr_vllm.errors import HeaprError
from heapr_vllm.formats.atomic import CHECKPOINT, MASKS, kind_of
from heapr_vllm.formats.checkpoint import Checkpoint
from heapr_vllm.formats.hub import upload_model
from heapr_vllm.prune.report.card import CARD_FILE, is_on_hub
from heapr_vllm.prune.report.summary import load_report


def push(directory: Path, repo_id: str, *, private: bool = False) -> str:
    """Uploads a masks repository or an exported checkpoint; returns the address of the commit.

    Makes the repository if there is none, `private` or as the account's default is. Raises HeaprError if `directory`
    is neither, half-written or damaged, if its weights are in a folder here, or if the Hub refuses.
    """
    check_whole(directory)
    checkpoint = Checkpoint(directory)
    if not checkpoint.has_weights and checkpoint.pruning and not is_on_hub(checkpoint.pruning.base_model):
        raise HeaprError(
            f"the base model of {directory} is a folder here, so nobody else could serve these masks; push what "
            "`heapr export` makes of them, or calibrate from the model's id on the Hub"
        )
    return upload_model(directory, repo_id, private=private)


def check_whole(directory: Path) -> None:
    """Raises HeaprError unless `directory` is a pruned model with all its files. Reads headers of weights only."""
    if not directory.is_dir() or kind_of(directory) not in (MASKS, CHECKPOINT):
        raise HeaprError(f"{directory} is no pruned model; `heapr prune` and `heapr export` write them")
    for name in ("config.json", CARD_FILE):  # written last
        if not (directory / name).is_file():
            raise HeaprError(f"{directory} lacks {name}, so it is not whole; write it again with --overwrite")
    checkpoint = Checkpoint(directory)
    summary = load_report(directory)
    if not checkpoint.has_weights:
        if checkpoint.pruning is None or checkpoint.pruning.layout != "masks":
            raise HeaprError(f"{directory} lacks its weights; run `heapr export` again with --overwrite")
        return
    if checkpoint.expert_shapes().keys() != summary.widths.keys():
        raise HeaprError(f"{directory} lacks experts that it has masks of; run `heapr export` again with --overwrite")
