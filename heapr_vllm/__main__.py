# SPDX-License-Identifier: Apache-2.0
"""The program `heapr`, also as `python -m heapr_vllm`."""

import signal
import sys
from typing import NoReturn


def run() -> NoReturn:
    """Runs the command line. Until `main` handles it, Ctrl-C ends the program at once, without a traceback."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # a job in the background ignores it
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from heapr_vllm.cli.main import main

    sys.exit(main())


if __name__ == "__main__":
    run()
