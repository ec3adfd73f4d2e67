# SPDX-License-Identifier: Apache-2.0
"""Tests. Without a GPU, Triton kernels are interpreted, which must be said before Triton is imported."""

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
