"""The rules that Prometheus is given: they parse, fire when they should, and have a runbook."""

import re
import subprocess
from pathlib import Path
from typing import Any

import grpc
import yaml

from service.errors import REFUSAL_REASONS
from tests.tools import tool

PROMETHEUS = Path(__file__).parent.parent.parent / "deploy" / "prometheus"
RUNBOOKS = PROMETHEUS.parent.parent / "docs" / "monitoring.md"
RULE_TESTS = sorted((PROMETHEUS / "tests").glob("*.yml"))


def promtool(*arguments: str | Path) -> str:
    done = subprocess.run(
        [tool("promtool"), *arguments], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def alerts() -> dict[str, Any]:
    groups = yaml.safe_load((PROMETHEUS / "alerts.yml").read_text())["groups"]
    return {rule["alert"]: rule for group in groups for rule in group["rules"]}


def test_prometheus_accepts_the_configuration_and_both_rule_files(tmp_path: Path) -> None:
    for name in ("prometheus.yml", "recording.yml", "alerts.yml"):
        (tmp_path / name).symlink_to(PROMETHEUS / name)
    (tmp_path / "local.targets.json").write_text("[]")
    out = promtool("check", "config", "--lint-fatal", tmp_path / "prometheus.yml")
    assert "2 rule files found" in out
    assert "WARNING" not in out


def test_alerts_fire_when_they_should_and_only_then() -> None:
    promtool("test", "rules", *RULE_TESTS)


def test_every_alert_has_a_case_that_fires_and_one_that_does_not() -> None:
    cases = {
        (case["alertname"], bool(case["exp_alerts"]))
        for file in RULE_TESTS
        for group in yaml.safe_load(file.read_text())["tests"]
        for case in group.get("alert_rule_test", [])
    }
    assert cases == {(name, fires) for name in alerts() for fires in (True, False)}


def test_every_rule_test_has_samples_at_its_time() -> None:
    """Without an interval promtool would put all samples at time 0, and nothing would ever fire."""
    for file in RULE_TESTS:
        for group in yaml.safe_load(file.read_text())["tests"]:
            assert group["interval"] == "1m", group["name"]


def test_rules_name_only_reasons_and_codes_that_exist() -> None:
    text = "".join((PROMETHEUS / f"{name}.yml").read_text() for name in ("recording", "alerts"))
    named = {
        label: {
            value
            for values in re.findall(rf'{label}=~?"([^"]+)"', text)
            for value in values.split("|")
        }
        for label in ("reason", "grpc_code")
    }
    assert named["reason"]
    assert named["reason"] <= set(REFUSAL_REASONS)
    assert named["grpc_code"]
    assert named["grpc_code"] <= set(grpc.StatusCode.__members__)


def test_every_alert_says_what_happened_and_what_to_do() -> None:
    headings = set(re.findall(r"^#+ (.+)$", RUNBOOKS.read_text(), re.MULTILINE))
    for name, rule in alerts().items():
        assert set(rule["annotations"]) == {"summary", "description", "runbook"}, name
        assert rule["labels"]["severity"] in ("page", "ticket"), name
        assert rule["annotations"]["runbook"] == f"docs/monitoring.md#{name.lower()}"
        assert name in headings, f"docs/monitoring.md has no section {name}"
