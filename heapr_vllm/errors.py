# SPDX-License-Identifier: Apache-2.0
"""The one exception that carries a message for the user."""


class HeaprError(ValueError):
    """A mistake the user can fix: one line that says what is wrong and what to do. The CLI exits with 2."""
