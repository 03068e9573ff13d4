"""What settings, pods, services and scalers of an overlay say of each other is the same."""

import json
import math
import re
import shlex

import pytest
import yaml
from grpc_health.v1 import health_pb2
from typer.testing import CliRunner

from protos.headroom.v1 import attention_pb2, generation_pb2, models_pb2
from service.cli import app
from service.runtimes import autoscaling
from tests.deploy.manifests import DEPLOY, OVERLAYS, find, render
from tests.deploy.overlays import (
    ALONE,
    ON_RAY,
    REPLICA,
    ports,
    replica,
    replica_template,
    serve_config,
    settings,
)

DOCKERFILE = (DEPLOY.parent / "Dockerfile").read_text()
GIB = 2**30
# Beside weights and cache: Python, torch and gRPC; under Ray its own processes, too.
PROCESS_BYTES = {"plain": 1 * GIB, "dev": 1 * GIB, "cpu": 2 * GIB, "gpu": 2 * GIB}
ROUNDING = 256 * 2**20
UNITS = {"Mi": 2**20, "Gi": 2**30}


def num_bytes(quantity: str) -> int:
    return int(quantity[:-2]) * UNITS[quantity[-2:]]


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_ports_of_pods_are_those_of_the_settings(overlay: str) -> None:
    config, named = settings(overlay), ports(replica(overlay))
    assert config.host == "0.0.0.0"
    assert named["metrics"] == config.metrics_port
    assert named["serve-grpc" if overlay in ON_RAY else "grpc"] == config.port
    exposed = re.search(r"^EXPOSE (.+)$", DOCKERFILE, re.MULTILINE)
    assert exposed
    assert set(map(int, exposed[1].split())) == {config.port, config.http_port, config.metrics_port}


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_collectors_of_logs_can_read_every_line_of_ours(overlay: str) -> None:
    assert settings(overlay).log_format == "json"


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_who_selects_replicas_selects_them_all_and_nothing_else(overlay: str) -> None:
    objects = render(overlay)
    selectors = [find(objects, "PodDisruptionBudget")["spec"]["selector"]["matchLabels"]]
    if overlay in ALONE:
        deployment = find(objects, "Deployment")["spec"]
        selectors.append(deployment["selector"]["matchLabels"])
        for name in ("headroom", "headroom-pods"):
            service = find(objects, "Service", name)["spec"]
            selectors.append(service["selector"])
            assert [port["targetPort"] for port in service["ports"]] == ["grpc"]
            assert [port["port"] for port in service["ports"]] == [9000]
    if overlay != "dev":
        monitor = find(objects, "PodMonitor")["spec"]
        selectors.append(monitor["selector"]["matchLabels"])
        (endpoint,) = monitor["podMetricsEndpoints"]
        assert endpoint["port"] in ports(replica(overlay))
        assert {
            "targetLabel": "application",
            "replacement": settings(overlay).application,
        } in endpoint["relabelings"]
    (spread,) = replica_template(overlay)["spec"]["topologySpreadConstraints"]
    selectors.append(spread["labelSelector"]["matchLabels"])
    assert all(selector == REPLICA for selector in selectors)
    assert REPLICA.items() <= replica_template(overlay)["metadata"]["labels"].items()


@pytest.mark.parametrize("overlay", [name for name in OVERLAYS if name != "dev"])
def test_the_route_leads_every_service_to_the_port_of_the_service(overlay: str) -> None:
    objects = render(overlay)
    route = find(objects, "GRPCRoute")["spec"]
    (rule,) = route["rules"]
    files = (generation_pb2, attention_pb2, models_pb2, health_pb2)
    assert {match["method"]["service"] for match in rule["matches"]} == {
        service.full_name for file in files for service in file.DESCRIPTOR.services_by_name.values()
    }
    assert rule["backendRefs"] == [{"name": "headroom", "port": settings(overlay).port}]
    (listener,) = find(objects, "Gateway")["spec"]["listeners"]
    assert route["hostnames"] == [listener["hostname"]]
    assert route["parentRefs"] == [{"name": "headroom", "sectionName": listener["name"]}]


@pytest.mark.parametrize("overlay", ALONE)
def test_a_pod_of_the_deployment_is_asked_for_health_and_has_time_to_drain(overlay: str) -> None:
    pod, container, config = replica_template(overlay)["spec"], replica(overlay), settings(overlay)
    assert config.runtime == "standalone"
    probes = {"startupProbe": "ready", "readinessProbe": "ready", "livenessProbe": "healthz"}
    for probe, state in probes.items():
        assert container[probe]["httpGet"] == {"path": f"/-/{state}", "port": "metrics"}
    # A step may take stall_seconds before the engine is unhealthy, and is not killed at once.
    liveness = container["livenessProbe"]
    assert liveness["periodSeconds"] * liveness["failureThreshold"] > config.stall_seconds
    before = int(container["lifecycle"]["preStop"]["exec"]["command"][1])
    assert pod["terminationGracePeriodSeconds"] > before + config.drain_seconds + 10
    (path,) = (
        mount["mountPath"] for mount in container["volumeMounts"] if mount["name"] == "settings"
    )
    assert container["args"] == ["serve", "--config", f"{path}/settings.yaml"]


def test_autoscalers_ask_for_metrics_that_exist_with_the_targets_of_the_policy() -> None:
    families = {f"headroom_{name}" for name in (autoscaling.WAITING, autoscaling.CACHE_USAGE)}
    rules = (DEPLOY / "prometheus" / "alerts.yml").read_text()
    assert all(family in rules for family in families)  # whose names a running server has proved
    hpa = find(render("plain"), "HorizontalPodAutoscaler")["spec"]
    assert hpa["scaleTargetRef"] == {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "name": "headroom",
    }
    assert {metric["pods"]["metric"]["name"] for metric in hpa["metrics"]} == families
    file = DEPLOY / "kubernetes" / "components" / "keda" / "scaled-object.yaml"
    scaled = yaml.safe_load(file.read_text())["spec"]
    assert {
        re.findall(r"headroom_\w+", trigger["metadata"]["query"])[0]
        for trigger in scaled["triggers"]
    } == families
    assert (scaled["minReplicaCount"], scaled["maxReplicaCount"]) == (
        hpa["minReplicas"],
        hpa["maxReplicas"],
    )
    assert (
        "replicas" not in find(render("plain"), "Deployment")["spec"]
    )  # they would be fought over


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_memory_and_limits_are_those_that_headroom_plan_gives(overlay: str) -> None:
    """The command stands at the pod; its answer decides what the pod asks for."""
    command = replica_template(overlay)["metadata"]["annotations"]["headroom/plan"]
    program, *arguments = shlex.split(command)
    assert program == "headroom"
    answer = CliRunner().invoke(app, [*arguments, "--json"])
    assert answer.exit_code == 0, answer.output
    plan = json.loads(answer.stdout)["plan"]
    config, container = settings(overlay), replica(overlay)
    assert config.engine.kv_cache_bytes is not None
    less_than_a_block = int(plan["kv_bytes_per_token"]) * plan["block_size"]
    assert 0 <= config.engine.kv_cache_bytes - int(plan["kv_cache_bytes"]) < less_than_a_block
    assert config.engine.max_num_seqs == plan["max_num_seqs"]
    assert int(plan["concurrent"]) >= config.engine.max_num_seqs
    weights, cache = int(plan["weight_bytes"]), int(plan["kv_cache_bytes"])
    # On a CPU weights are in memory twice while they are packed; on a GPU they pass through once.
    needed = PROCESS_BYTES[overlay] + (weights if overlay == "gpu" else 2 * weights + cache)
    assert (
        num_bytes(container["resources"]["requests"]["memory"])
        == math.ceil(needed / ROUNDING) * ROUNDING
    )
    assert config.engine.num_threads == int(container["resources"]["requests"]["cpu"])
    if overlay in ON_RAY:
        (deployment,) = serve_config(overlay)["applications"][0]["deployments"]
        assert deployment["ray_actor_options"]["num_cpus"] == config.engine.num_threads
