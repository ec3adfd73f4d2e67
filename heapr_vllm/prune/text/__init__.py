# SPDX-License-Identifier: Apache-2.0
"""A dataset spec to token samples."""
