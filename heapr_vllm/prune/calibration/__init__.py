# SPDX-License-Identifier: Apache-2.0
"""Token samples to neuron moments."""
