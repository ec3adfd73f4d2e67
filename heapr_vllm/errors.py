# SPDX-License-Identifier: Apache-2.0
"""The one exception that carries a message for the user."""


class HeaprError(ValueError):
    """A mistake the user can fix: one line that says what is wrong and what to do. The CLI exits with 2."""

    def __init__(self, message: str) -> None:
        """Escapes what is not printable: messages quote names out of files that anybody may have written."""
        super().__init__("".join(each if each.isprintable() else repr(each)[1:-1] for each in message))


def first_line(error: BaseException) -> str:
    """The first line of another library's message."""
    return next(iter(str(error).splitlines()), type(error).__name__)
