# SPDX-License-Identifier: Apache-2.0
"""Kept weights refitted to make up for the removed ones."""
