# SPDX-License-Identifier: Apache-2.0
"""How good a pruned model is, in transformers or served by vLLM."""
