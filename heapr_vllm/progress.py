# SPDX-License-Identifier: Apache-2.0
"""Progress of long work: a bar on a terminal, in a log a line every half minute, and none for what is done sooner."""

from __future__ import annotations

import sys
from typing import Any

from tqdm import tqdm

SECONDS_BETWEEN_LINES = 30


class _Lines(tqdm):
    """Prints what the bar would show as a line of its own."""

    def display(self, *args: Any, **kwargs: Any) -> bool:
        print(str(self), file=sys.stderr, flush=True)
        return True


def progress(*args: Any, **kwargs: Any) -> tqdm:
    """Makes a tqdm bar from tqdm's arguments."""
    if sys.stderr.isatty():
        return tqdm(*args, **kwargs)
    seconds = SECONDS_BETWEEN_LINES
    return _Lines(*args, mininterval=seconds, maxinterval=seconds, delay=seconds, **kwargs)
