# SPDX-License-Identifier: Apache-2.0
"""Names of files that a repository's own files mention: nobody gets out of its folder by them."""

from __future__ import annotations

import os
from pathlib import Path

from heapr_vllm.errors import HeaprError

HUB_CACHE = ("snapshots", "blobs")  # the Hub's cache links files of a snapshot to its blobs


def inside(folder: Path, name: str) -> Path:
    """Returns the path of a file in `folder`, which need not exist.

    Raises HeaprError if `name` leads out of it, by its parts or through a symbolic link; links of the Hub's cache are
    followed.
    """
    path = folder / name
    home = Path(os.path.realpath(folder))
    allowed = [home]
    if home.parent.name == HUB_CACHE[0]:
        allowed.append(home.parent.parent / HUB_CACHE[1])
    try:
        target = Path(os.path.realpath(path))
        path.exists()
    except (ValueError, OSError) as error:  # a null byte, or too long
        raise HeaprError(f"{folder} mentions {name!r}, which is no name of a file ({error})") from error
    if Path(name).is_absolute() or ".." in Path(name).parts or not any(map(target.is_relative_to, allowed)):
        raise HeaprError(
            f"{folder} mentions {name}, which lies outside of it; nothing outside is read or written: "
            "copy the file there, or link the whole folder"
        )
    return path
