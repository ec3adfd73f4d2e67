# SPDX-License-Identifier: Apache-2.0
"""Our Triton kernels for GPUs."""
