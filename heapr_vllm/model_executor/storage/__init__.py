# SPDX-License-Identifier: Apache-2.0
"""Expert weights in memory: where neurons lie, and which rank holds them."""
