# SPDX-License-Identifier: Apache-2.0
"""`heapr tune`, and the timing that benchmarks share."""
