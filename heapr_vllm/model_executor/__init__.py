# SPDX-License-Identifier: Apache-2.0
"""The vLLM plugin: loads masks or compact checkpoints and runs experts of variable width."""
