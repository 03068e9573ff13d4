"""Gathers what load processes report, writes it down, and sums it up."""

import math
from pathlib import Path
from typing import Any

from loadtests.load import LoadSpec, LoadSummary
from loadtests.samples import Sample, open_samples, write_sample
from loadtests.summary import summarize


class Collector:
    """Of one load.

    Args:
        processes: that report.
        path: where each sample is written as it comes.
    """

    def __init__(self, spec: LoadSpec, processes: int, path: Path | None) -> None:
        self._stages = [] if spec.shape == "steady" else spec.stages
        self._processes = processes
        self._file = open_samples(path) if path else None
        self._samples: list[Sample] = []
        self._client_cpu = 0.0
        self._began = math.inf
        self._num_over = 0

    @property
    def num_requests(self) -> int:
        return len(self._samples)

    @property
    def is_over(self) -> bool:
        """Whether every process has sent its last report."""
        return self._num_over == self._processes

    def add(self, report: dict[str, Any]) -> None:
        """A report of `Node.report`."""
        samples = [Sample(**fields) for fields in report["samples"]]
        self._samples += samples
        if self._file:
            for sample in samples:
                write_sample(self._file, sample)
        if report["over"]:
            self._client_cpu = max(self._client_cpu, report["client_cpu"])
            self._began = min(self._began, report["began"])
            self._num_over += 1

    def close(self) -> LoadSummary:
        """The summary; the file is then complete."""
        if self._file:
            self._file.close()
        return summarize(
            self._samples, client_cpu=self._client_cpu, began=self._began, stages=self._stages
        )
