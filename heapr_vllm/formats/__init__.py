# SPDX-License-Identifier: Apache-2.0
"""What lies on disk: checkpoints, masks, configs. Never vLLM, never a model."""
