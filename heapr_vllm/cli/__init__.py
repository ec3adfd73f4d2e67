# SPDX-License-Identifier: Apache-2.0
"""The `heapr` command: one file holds a command's arguments and what it calls."""
