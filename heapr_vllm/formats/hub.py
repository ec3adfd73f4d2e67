# SPDX-License-Identifier: Apache-2.0
"""Files of the Hub, fetched into its cache."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from heapr_vllm.errors import HeaprError, first_line


def download_checkpoint(repo_id: str, revision: str | None, patterns: Sequence[str]) -> Path:
    """Fetches files of a Hub repository; returns their folder. Raises HeaprError if there is no such repository."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(repo_id, revision=revision, allow_patterns=list(patterns)))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
        raise HeaprError(
            f"{repo_id} is neither a local directory nor reachable on the Hub: {first_line(error)}"
        ) from error


def download(repo_id: str, name: str, revision: str | None) -> Path:
    """Fetches one file of a Hub repository. Raises HeaprError if it has none, or there is no such repository."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(repo_id, name, revision=revision))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
        raise HeaprError(
            f"{repo_id} is no local file or directory, and the Hub has no {name} of it: {first_line(error)}"
        ) from error
