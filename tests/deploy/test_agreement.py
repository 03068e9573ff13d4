"""What image, settings, serve configuration and manifests say of each other is the same."""

import ast
import json
import math
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from grpc_health.v1 import health_pb2
from typer.testing import CliRunner

from loadtests.options import add_options
from protos.headroom.v1 import attention_pb2, generation_pb2, models_pb2
from service.cli import app
from service.config import ServiceConfig
from service.runtimes import autoscaling
from service.runtimes.ray_environment import DEREGISTER_SECONDS
from tests.deploy.manifests import (
    DEPLOY,
    OVERLAYS,
    Manifest,
    find,
    pod_templates,
    render,
    unknown_keys,
)
from tests.deploy.test_manifests import ALONE, HEAD, ON_RAY, REPLICA
from tests.loadtests.test_load import Parser

ROOT = DEPLOY.parent
DOCKERFILE = (ROOT / "Dockerfile").read_text()
GIB = 2**30
# Beside weights and cache: Python, torch and gRPC; under Ray its own processes, too.
PROCESS_BYTES = {"plain": 1 * GIB, "dev": 1 * GIB, "cpu": 2 * GIB, "gpu": 2 * GIB}
ROUNDING = 256 * 2**20
UNITS = {"Mi": 2**20, "Gi": 2**30}


def num_bytes(quantity: str) -> int:
    return int(quantity[:-2]) * UNITS[quantity[-2:]]


def replica_template(overlay: str) -> Manifest:
    return next(
        template for component, template in pod_templates(render(overlay)) if component == "replica"
    )


def replica(overlay: str) -> Manifest:
    container: Manifest = replica_template(overlay)["spec"]["containers"][0]
    return container


def ports(container: Manifest) -> dict[str, int]:
    return {port["name"]: port["containerPort"] for port in container["ports"]}


def serve_config(overlay: str) -> Any:
    return yaml.safe_load(find(render(overlay), "RayService")["spec"]["serveConfigV2"])


def settings(overlay: str) -> ServiceConfig:
    if overlay in ON_RAY:
        (application,) = serve_config(overlay)["applications"]
        given = {"application": application["name"], **application["args"]}
    else:
        (text,) = (
            each["data"]["settings.yaml"]
            for each in render(overlay)
            if each["kind"] == "ConfigMap"
            and each["metadata"]["name"].startswith("headroom-settings-")
        )
        given = yaml.safe_load(text)
    return ServiceConfig(**given)


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
def test_images_are_targets_of_the_dockerfile(overlay: str) -> None:
    targets = re.findall(r"^FROM runtime AS (\w+)$", DOCKERFILE, re.MULTILINE)
    wanted = "cuda" if overlay == "gpu" else "cpu"
    assert wanted in targets
    for _, template in pod_templates(render(overlay)):
        for container in template["spec"]["containers"] + template["spec"].get(
            "initContainers", []
        ):
            assert container["image"] in (f"headroom:{wanted}", "headroom-weights:latest")
    gpus = replica(overlay)["resources"]["limits"].get("nvidia.com/gpu", "0")
    assert int(gpus) == (wanted == "cuda")


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


def test_serve_reads_all_of_its_configuration() -> None:
    """Its schema takes unknown keys and drops them."""
    misspelt = serve_config("cpu")
    misspelt["applications"][0]["deployments"][0]["max_replicas_per_nod"] = 1
    given = [*map(serve_config, ON_RAY), misspelt]
    done = subprocess.run(
        [sys.executable, "-m", "tests.deploy.serve_schema"],
        input="".join(f"{json.dumps(each)}\n" for each in given),
        capture_output=True,
        text=True,
        timeout=60,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
    read = [json.loads(line) for line in done.stdout.splitlines()]
    unknown = [unknown_keys(one, other) for one, other in zip(given, read, strict=True)]
    assert unknown == [[], [], ["applications.0.deployments.0.max_replicas_per_nod"]]


@pytest.mark.parametrize("overlay", ON_RAY)
def test_the_serve_configuration_is_that_of_our_runtime(overlay: str) -> None:
    given, config = serve_config(overlay), settings(overlay)
    assert given["grpc_options"]["grpc_servicer_functions"] == _servicer_functions()
    assert given["grpc_options"]["port"] == config.port
    assert given["grpc_options"]["enable_reflection"] is False
    assert given["http_options"] == {"host": config.host, "port": config.http_port}
    (application,) = given["applications"]
    module, _, function = application["import_path"].partition(":")
    source = (ROOT / module.replace(".", "/")).with_suffix(".py").read_text()
    names = {
        node.name
        for node in ast.parse(source).body
        if isinstance(node, ast.FunctionDef | ast.ClassDef)
    }
    (deployment,) = application["deployments"]
    assert {function, deployment["name"]} <= names
    assert application["route_prefix"] == "/"
    assert config.engine.device == ("cuda" if overlay == "gpu" else "cpu")
    assert deployment["ray_actor_options"]["num_gpus"] == (overlay == "gpu")
    assert deployment["max_replicas_per_node"] == 1  # each has the port metrics of its pod
    policy = deployment["autoscaling_config"]["policy"]
    assert policy["policy_function"] == f"{autoscaling.__name__}:QueueAndCachePolicy"
    autoscaling.QueueAndCachePolicy(**policy["policy_kwargs"])


def _servicer_functions() -> list[str]:
    """Read and not imported: Ray must not be imported before its variables are set."""
    source = (ROOT / "service" / "runtimes" / "ray_serve.py").read_text()
    (value,) = (
        node.value
        for node in ast.parse(source).body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "SERVICER_FUNCTIONS"
    )
    functions: list[str] = ast.literal_eval(value)
    return functions


@pytest.mark.parametrize("overlay", ON_RAY)
def test_a_ray_service_keeps_the_rules_of_kuberay(overlay: str) -> None:
    spec = find(render(overlay), "RayService")["spec"]
    cluster = spec["rayClusterConfig"]
    locked = re.search(r"^ray==(.+)$", (ROOT / "requirements.lock").read_text(), re.MULTILINE)
    assert locked
    assert cluster["rayVersion"] == locked[1]
    assert spec["upgradeStrategy"] == {"type": "NewCluster"}
    assert spec["excludeHeadPodFromServeSvc"] is True
    (head, worker) = (template for _, template in pod_templates(render(overlay)))
    containers = [head["spec"]["containers"][0], worker["spec"]["containers"][0]]
    assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    # KubeRay makes the Service from the head's ports whose names begin with serve.
    (port,) = spec["serveService"]["spec"]["ports"]
    for container in containers:
        assert ports(container)[port["name"]] == port["port"] == settings(overlay).port
        assert ports(container)["serve"] == settings(overlay).http_port
    assert spec["serveService"]["metadata"]["name"] == "headroom"  # where the route leads
    assert containers[1]["readinessProbe"]["httpGet"] == {"path": "/-/healthz", "port": "serve"}
    environments = [{each["name"]: each["value"] for each in one["env"]} for one in containers]
    assert environments[0] == environments[1]
    assert (
        environments[0].items()
        >= {
            "RAY_SERVE_ENABLE_HA_PROXY": "1",
            "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
            "RAY_SERVE_GRPC_MAX_MESSAGE_SIZE": str(settings(overlay).max_message_bytes),
            "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": str(DEREGISTER_SECONDS),
            "RAY_AUTH_MODE": "token",
            "RAY_USE_TLS": "1",
        }.items()
    )
    autoscaler = {each["name"]: each["value"] for each in cluster["autoscalerOptions"]["env"]}
    assert autoscaler.items() <= environments[0].items()
    assert autoscaler["RAY_USE_TLS"] == "1"
    (scaling,) = (
        one["autoscaling_config"] for one in serve_config(overlay)["applications"][0]["deployments"]
    )
    (group,) = cluster["workerGroupSpecs"]
    assert (group["minReplicas"], group["maxReplicas"]) == (
        scaling["min_replicas"],
        scaling["max_replicas"],
    )
    assert find(render(overlay), "PodDisruptionBudget", "headroom-head")["spec"]["selector"] == {
        "matchLabels": HEAD
    }


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


def test_compose_mounts_what_exists_and_asks_the_ports_of_the_settings() -> None:
    directory = DEPLOY / "docker"
    services = yaml.safe_load((directory / "compose.yaml").read_text())["services"]
    given = yaml.safe_load((directory / "settings.yaml").read_text())
    config = ServiceConfig(**given)
    for service in services.values():
        for volume in service.get("volumes", []):
            source = volume.split(":")[0]
            named = source in ("prometheus", "grafana") or source.startswith("./secrets")
            assert named or (directory / source).exists()
        if "build" in service:
            target = service["build"]["target"]
            assert f"FROM runtime AS {target}\n" in DOCKERFILE
            assert service["image"] == f"headroom:{target}"
    headroom = services["headroom"]
    assert headroom["ports"] == [f"{config.port}:{config.port}"]
    assert f":{config.metrics_port}/-/ready" in headroom["healthcheck"]["test"][-1]
    scrapes = yaml.safe_load((directory / "prometheus.yml").read_text())
    (group,) = scrapes["scrape_configs"][0]["static_configs"]
    assert group == {
        "targets": [f"headroom:{config.metrics_port}"],
        "labels": {"application": config.application},
    }
    assert services["grafana"]["environment"]["PROMETHEUS_URL"] == "http://prometheus:9090"


def test_compose_gives_locust_what_its_server_asks_for() -> None:
    """By the certificate that docs/deploy.md makes, and with the options that locust has."""
    services = yaml.safe_load((DEPLOY / "docker" / "compose.yaml").read_text())["services"]
    locust, (_, _, file, *options) = services["locust"], services["locust"]["command"]
    local = Path(file).relative_to("/opt/headroom/lib/python3.11/site-packages")
    assert (ROOT / local).is_file()
    parser = Parser()
    add_options(parser)
    parser.add_argument("--host")
    given = parser.parse_args(options)
    mounts = [volume.split(":") for volume in locust["volumes"]]
    assert {inside: outside for outside, inside, _ in mounts} == {
        given.tls_ca: "./secrets/tls.crt",
        given.token_file: "./secrets/locust.token",
    }
    host, _, port = given.host.partition(":")
    config = ServiceConfig(**yaml.safe_load((DEPLOY / "docker" / "settings.yaml").read_text()))
    assert (services[host]["image"], int(port)) == ("headroom:cpu", config.port)
    assert config.tls_cert is not None
    assert config.client_ca is None
    page = (ROOT / "docs" / "deploy.md").read_text()
    assert f"subjectAltName=DNS:localhost,DNS:{host} " in page
    assert "tokens.yaml 2> deploy/docker/secrets/locust.token" in page


def test_the_image_is_built_from_every_package_and_its_data() -> None:
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    kept = [ROOT / line[1:] for line in lines if line.startswith("!")]
    packages = [name.rstrip("*") for name in setuptools["packages"]["find"]["include"]]
    needed = [ROOT / name / "__init__.py" for name in packages]
    for name, patterns in setuptools["package-data"].items():
        for pattern in patterns:
            found = list((ROOT / name).glob(pattern))
            assert found, f"{name}/{pattern}"
            needed += found
    for path in needed:
        assert any(path.is_relative_to(folder) for folder in kept), path


def test_the_image_has_what_the_tests_ran_with() -> None:
    """But for Triton, which the CUDA build of torch chooses, and torch's own build."""
    pins = dict(
        line.split("==")
        for line in (ROOT / "requirements.lock").read_text().splitlines()
        if "==" in line
    )
    pins = {re.sub(r"[-_.]+", "-", name).lower(): version for name, version in pins.items()}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    needed = {re.split(r"[^a-z0-9-]", one, maxsplit=1)[0] for one in project["dependencies"]}
    for target in ("cpu", "loadtests", "cuda"):
        lines = (DEPLOY / "docker" / f"{target}.lock").read_text().splitlines()[1:]
        held = {re.sub(r"[-_.]+", "-", line.split("==")[0]).lower() for line in lines}
        assert needed <= held, f"{target}: make image-locks"
        for line in lines:
            requirement, _, digest = line.partition(" --hash=sha256:")
            assert re.fullmatch(r"[0-9a-f]{64}", digest), line
            name, _, version = requirement.partition("==")
            pinned = pins.get(re.sub(r"[-_.]+", "-", name).lower())
            if name == "torch":
                assert version == f"{pinned}+cpu" * (target != "cuda") or version == pinned
            elif pinned is not None and name != "triton":
                assert version == pinned, line
