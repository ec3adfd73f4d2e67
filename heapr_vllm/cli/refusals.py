# SPDX-License-Identifier: Apache-2.0
"""What to do when the system does not let us write."""

from __future__ import annotations

import argparse
import errno
import os
import re
from pathlib import Path

REMEDIES = {
    errno.ENOSPC: "free some space there, or choose another place",
    errno.EDQUOT: "free some space there, or choose another place",
    errno.EROFS: "choose another place",
    errno.EACCES: "choose another place, or change its permissions",
    errno.EPERM: "choose another place, or change its permissions",
    errno.ENOENT: "create its folder, or choose another place",
    errno.ENOTDIR: "choose another place",
}
ABOUT_OUTPUTS = (errno.EACCES, errno.EPERM, errno.ENOENT, errno.ENOTDIR)  # inputs may be meant too
_CODE = re.compile(r"\(os error (\d+)\)")  # in the messages of safetensors


def refusal(error: Exception, args: argparse.Namespace) -> str | None:
    """Says which file or folder the system refuses to a command, and what to do; None if it is not about that.

    Errors of a full disk name no file, so what the command was to write is named.
    """
    code = error.errno if isinstance(error, OSError) else None
    if type(error).__name__ == "SafetensorError" and (match := _CODE.search(str(error))):
        code = int(match[1])
    if code not in REMEDIES:
        return None
    named = getattr(error, "filename2", None) or getattr(error, "filename", None)
    outputs = [path for name in ("output", "plot") if (path := getattr(args, name, None))]
    if code in ABOUT_OUTPUTS and not any(_is_near(named, output) for output in outputs):
        return None
    return f"{named or next(iter(outputs), 'the output')}: {os.strerror(code)}; {REMEDIES[code]}"


def _is_near(named: str | None, output: Path) -> bool:
    return named is not None and Path(named).resolve().is_relative_to(output.resolve().parent)
