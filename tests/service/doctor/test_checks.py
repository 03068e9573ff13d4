"""The doctor names what is wrong with a machine, and changes nothing."""

import importlib.metadata
import json
import socket
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from service.cli import app
from service.config import ServiceConfig
from service.doctor import Finding, Level, examine
from service.engine import EngineConfig
from service.runtimes.ray_environment import free_ports

Usage = namedtuple("Usage", "total used free")


def settings(**changes: object) -> ServiceConfig:
    port, http_port, metrics_port = free_ports(3)
    ports = {"port": port, "http_port": http_port, "metrics_port": metrics_port}
    return ServiceConfig(**{**ports, **changes})  # type: ignore[arg-type]


def findings(environment: dict[str, str] | None = None, **changes: object) -> dict[str, Finding]:
    return {one.check: one for one in examine(settings(**changes), environment or {})}


def test_a_machine_that_runs_these_tests_can_serve() -> None:
    found = findings()
    assert {"python", "torch", "model headroom", "memory", "ray", "port", "http_port"} <= set(found)
    assert [one for one in found.values() if one.level == "error"] == []
    assert all(bool(one.advice) == (one.level != "ok") for one in found.values())


def test_without_ray_nothing_of_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "version", pytest.fail)
    found = findings({"RAY_ADDRESS": "10.0.0.1:6379"}, runtime="standalone")
    assert not {"ray", "RAY_ADDRESS", "http_port", "shared memory"} & set(found)


def test_a_taken_port_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        number = taken.getsockname()[1]
        found = findings(port=number)["port"]
    assert found.level == "error"
    assert found.fact == f"127.0.0.1:{number}: Address already in use"
    assert found.advice.endswith("choose another --port")


def test_a_model_that_cannot_be_served_is_named(tmp_path: Path) -> None:
    found = findings(model={"good": "demo", "bad": str(tmp_path / "none")})
    assert found["model good"].level == "ok"
    assert found["model bad"].level == "error"
    assert str(tmp_path / "none") in found["model bad"].fact


@pytest.mark.parametrize(
    ("environment", "name"),
    [
        ({"OMP_WAIT_POLICY": "PASSIVE"}, "OMP_WAIT_POLICY"),
        ({"GOMP_SPINCOUNT": "100"}, "GOMP_SPINCOUNT"),
        ({"RAY_ADDRESS": "10.0.0.1:6379"}, "RAY_ADDRESS"),
        ({"RAY_SERVE_ENABLE_HA_PROXY": "0"}, "RAY_SERVE_ENABLE_HA_PROXY"),
    ],
)
def test_variables_that_slow_or_mislead_are_named(environment: dict[str, str], name: str) -> None:
    found = findings(environment)[name]
    assert found.level == "warning"
    assert found.fact == environment[name]


def test_variables_that_do_no_harm_are_not() -> None:
    quiet = {"OMP_WAIT_POLICY": "active", "RAY_SERVE_ENABLE_HA_PROXY": "1"}
    assert not set(quiet) & set(findings(quiet))


@pytest.mark.parametrize(
    ("version", "level"), [("2.60.1", "ok"), ("2.59.9", "error"), ("2.61.0", "error")]
)
def test_another_ray_is_refused(
    version: str, level: Level, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda name: version)
    assert findings()["ray"] == Finding(
        "ray", level, version, "" if level == "ok" else "install ray[serve]>=2.60,<2.61"
    )


def test_certificates_that_make_no_server_are_named(tmp_path: Path) -> None:
    found = findings(tls_cert=tmp_path / "none", tls_key=tmp_path / "none")["certificates"]
    assert (found.level, found.fact.split()[0]) == ("error", "tls_cert")


def test_too_little_memory_is_counted_for_all_replicas(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("service.doctor.checks.available_memory", lambda: 3 * 2**30)
    assert findings(replicas=1)["memory"].level == "ok"
    monkeypatch.setattr("service.doctor.checks.available_memory", lambda: 2**30)
    found = findings(replicas=1)["memory"]
    assert found.level == "error"
    assert found.fact.startswith("1.0 GiB available, 1.5 GiB needed")
    assert findings(runtime="standalone")["memory"].level == "ok"


def test_a_device_that_is_not_there_is_named_and_memory_is_not_asked_of_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    found = findings(engine=EngineConfig(device="cuda"))
    assert (found["device"].level, found["device"].fact) == (
        "error",
        "device is 'cuda'; this machine has 0 CUDA devices",
    )
    assert "memory" not in found


def test_a_device_that_ray_cannot_give_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (2**33, 2**33))
    found = findings(engine=EngineConfig(device="cuda:1"))["device"]
    assert found.level == "error"
    assert found.fact.startswith("engine.device is 'cuda:1'; allowed with Ray: auto, cpu, cuda")
    single = findings(runtime="standalone", engine=EngineConfig(device="cuda:1"))
    assert single["device"] == Finding("device", "ok", "cuda:1")


def test_full_disks_and_few_files_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: Usage(2**30, 2**30 - 2**20, 2**20))
    monkeypatch.setattr("resource.getrlimit", lambda which: (1024, 4096))
    found = findings()
    for check in ("shared memory", "temporary files"):
        assert found[check].level == "error"
        assert found[check].fact.startswith("1 MiB free in /")
    assert found["open files"] == Finding(
        "open files", "warning", "1024, at most 4096", "ulimit -n 4096"
    )


def test_a_missing_library_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("service.doctor.checks.why_unavailable", lambda: "it was not compiled")
    found = findings()["operations in C++"]
    assert (found.level, found.fact) == ("warning", "it was not compiled")
    assert "compiler" in found.advice


def test_the_command_prints_a_line_for_each_and_fails_with_one(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name, value in zip(("PORT", "HTTP_PORT", "METRICS_PORT"), free_ports(3), strict=True):
        monkeypatch.setenv(f"HEADROOM_{name}", str(value))
    good = CliRunner().invoke(app, ["doctor"], env={"COLUMNS": "200"})
    assert good.exit_code == 0, good.output
    assert "model headroom" in good.output
    bad = CliRunner().invoke(app, ["doctor", "--json", "--model", str(tmp_path)])
    assert bad.exit_code == 1
    levels = {one["check"]: one["level"] for one in json.loads(bad.output)}
    assert levels["model headroom"] == "error"
    assert levels["port"] == "ok"
    unknown = CliRunner().invoke(app, ["doctor", "--config", str(tmp_path / "none.yaml")])
    assert unknown.exit_code == 2
    monkeypatch.setenv("HEADROOM_RUNTIME", "standalone")
    monkeypatch.setenv("HEADROOM_REPLICAS", "2")
    refused = CliRunner().invoke(app, ["doctor"])
    assert refused.exit_code == 2
    assert "replicas is 2; allowed: 1 with the standalone runtime" in refused.output
