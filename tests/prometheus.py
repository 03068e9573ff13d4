"""A real Prometheus that scrapes what a target file names."""

import json
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from service.runtimes.ray_environment import free_ports
from tests.integration.processes import Process
from tests.tools import tool

Sample = tuple[dict[str, str], float]
_POLL_SECONDS = 0.1


@dataclass(frozen=True, slots=True)
class Prometheus:
    url: str

    def query(self, promql: str) -> list[Sample]:
        """The instant vector of an expression; a scalar has no labels.

        Raises:
            urllib.error.HTTPError: the expression is wrong.
        """
        data = self.get("/api/v1/query", query=promql)["data"]
        if data["resultType"] == "scalar":
            return [({}, float(data["result"][1]))]
        return [(row["metric"], float(row["value"][1])) for row in data["result"]]

    def wait_for(
        self, promql: str, check: Callable[[list[Sample]], bool], seconds: float = 30
    ) -> list[Sample]:
        """Ask until the answer is as wanted; fails with the last answer."""
        deadline = time.monotonic() + seconds
        while not check(answer := self.query(promql)):
            assert time.monotonic() < deadline, f"{promql} is still {answer}"
            time.sleep(_POLL_SECONDS)
        return answer

    def get(self, path: str, **parameters: str) -> Any:
        """A JSON document of its HTTP interface."""
        query = urllib.parse.urlencode(parameters)
        with urllib.request.urlopen(f"{self.url}{path}?{query}", timeout=10) as answer:
            return json.load(answer)


@contextmanager
def running_prometheus(
    directory: Path, targets_file: Path, *, rules: Sequence[Path] = ()
) -> Iterator[Prometheus]:
    """A Prometheus that scrapes every second and keeps its data in a directory of the test.

    Args:
        targets_file: in the format of `file_sd_configs`; may change while it runs.
        rules: rule files that it evaluates every second.
    """
    port = free_ports(1)[0]
    config = {
        "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
        "rule_files": [str(path.resolve()) for path in rules],
        "scrape_configs": [
            {
                "job_name": "headroom",
                "file_sd_configs": [
                    {"files": [str(targets_file.resolve())], "refresh_interval": "1s"}
                ],
            }
        ],
    }
    config_file = directory / "prometheus.yml"
    config_file.write_text(json.dumps(config))  # JSON is YAML
    arguments = [
        f"--config.file={config_file}",
        f"--storage.tsdb.path={directory / 'data'}",
        f"--web.listen-address=127.0.0.1:{port}",
    ]
    with Process(*arguments, program=tool("prometheus")) as process:
        process.wait_for(lambda line: "Server is ready to receive web requests" in line)
        yield Prometheus(f"http://127.0.0.1:{port}")
