# SPDX-License-Identifier: Apache-2.0
"""Commands behind every number in the docs."""
