"""Gathers what load processes report, writes it down, and sums it up."""

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
        self._last_reports: list[dict[str, Any]] = []

    @property
    def num_requests(self) -> int:
        return len(self._samples)

    @property
    def is_over(self) -> bool:
        """Whether every process has sent its last report."""
        return len(self._last_reports) == self._processes

    def add(self, report: dict[str, Any]) -> None:
        """A report of `Node.report`."""
        samples = [Sample(**fields) for fields in report["samples"]]
        self._samples += samples
        if self._file:
            for sample in samples:
                write_sample(self._file, sample)
        if report["over"]:
            self._last_reports.append(report)

    def close(self) -> LoadSummary:
        """The summary once all is over; the file is then complete."""
        if self._file:
            self._file.close()
        waits = [report["client_wait"] for report in self._last_reports]
        return summarize(
            self._samples,
            client_cpu=max(report["client_cpu"] for report in self._last_reports),
            client_wait=max((wait for wait in waits if wait is not None), default=None),
            began=min(report["began"] for report in self._last_reports),
            stages=self._stages,
        )
