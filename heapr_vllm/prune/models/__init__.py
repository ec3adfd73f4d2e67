# SPDX-License-Identifier: Apache-2.0
"""Checkpoints as transformers models."""
