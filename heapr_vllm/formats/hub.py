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


def upload_model(folder: Path, repo_id: str, *, private: bool) -> str:
    """Makes a model repository unless it is there, and commits all files of `folder`; returns the commit's address.

    Raises HeaprError without a token, without a network, or if the Hub takes no such repository.
    """
    from huggingface_hub import HfApi, get_token
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError, OfflineModeIsEnabled
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise HeaprError(f"{repo_id!r} is no name of a repository, such as you/model: {first_line(error)}") from error
    if get_token() is None:
        raise HeaprError("no token of the Hub; log in with `hf auth login`, or set HF_TOKEN")
    hub = HfApi()
    try:
        repository = hub.create_repo(repo_id, private=private or None, exist_ok=True)
        return str(
            hub.upload_folder(folder_path=folder, repo_id=repository.repo_id, commit_message="Upload with heapr")
        )
    except OfflineModeIsEnabled as error:
        raise HeaprError("HF_HUB_OFFLINE is set, so nothing can be uploaded; unset it") from error
    except HfHubHTTPError as error:
        raise HeaprError(
            f"the Hub refused {repo_id}: {first_line(error)}; check the name, and that the token may write there"
        ) from error
    except (HTTPError, OSError) as error:
        raise HeaprError(f"the Hub cannot be reached ({first_line(error)}); check the network") from error
