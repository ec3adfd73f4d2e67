# SPDX-License-Identifier: Apache-2.0
"""Masks to files."""
