# SPDX-License-Identifier: Apache-2.0
"""A CPU worker that says what loading the model cost: `worker_cls="tests.model_executor.measured_worker.Worker"`."""

from pathlib import Path

from vllm.v1.worker.cpu_worker import CPUWorker


class Worker(CPUWorker):
    """`collective_rpc("loading")` returns bytes per rank."""

    def load_model(self, *args, **kwargs) -> None:
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak
        before = resident()["VmRSS"]
        super().load_model(*args, **kwargs)
        after = resident()
        parameters = dict(self.get_model().named_parameters())
        self._loading = {
            "peak": after["VmHWM"] - before,
            "resident": after["VmRSS"] - before,
            "parameters": sum(p.nbytes for p in parameters.values()),
            "experts": sum(p.nbytes for name, p in parameters.items() if ".experts." in name),
        }

    def loading(self) -> dict[str, int]:
        """Peak and lasting growth of resident memory, mapped files included; bytes of all and of expert parameters."""
        return self._loading


def resident() -> dict[str, int]:
    """VmRSS and VmHWM, its peak, of this process in bytes."""
    lines = (line.split() for line in Path("/proc/self/status").read_text().splitlines())
    return {line[0][:-1]: 1024 * int(line[1]) for line in lines if line[0] in ("VmRSS:", "VmHWM:")}
