# SPDX-License-Identifier: Apache-2.0
"""Our C++ op for CPUs, compiled once on first use."""
