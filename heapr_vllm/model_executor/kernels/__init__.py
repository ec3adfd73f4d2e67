# SPDX-License-Identifier: Apache-2.0
"""Ways to run a layer of variable-width experts, one per file or folder."""
