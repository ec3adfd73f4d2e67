# SPDX-License-Identifier: Apache-2.0
"""What masks do, for people."""
