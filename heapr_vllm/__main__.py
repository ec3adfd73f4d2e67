# SPDX-License-Identifier: Apache-2.0
"""`python -m heapr_vllm` is the `heapr` command."""

from heapr_vllm.cli.main import main

raise SystemExit(main())
