# SPDX-License-Identifier: Apache-2.0
"""Neuron moments to masks."""
