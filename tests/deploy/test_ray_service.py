"""The RayService keeps the rules of Ray Serve and KubeRay."""

import ast
import json
import re
import subprocess
import sys

import pytest

from service.runtimes import autoscaling
from service.runtimes.ray_environment import DEREGISTER_SECONDS
from tests.deploy.manifests import DEPLOY, find, pod_templates, render, unknown_keys
from tests.deploy.overlays import (
    HEAD,
    ON_RAY,
    ports,
    replica,
    replica_template,
    serve_config,
    settings,
)

ROOT = DEPLOY.parent


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
            "RAY_LOG_TO_STDERR": "1",  # else to files that end with the pod
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


@pytest.mark.parametrize("overlay", ON_RAY)
def test_a_replica_may_drain_before_its_pod_ends(overlay: str) -> None:
    """`ray start` waits between SIGTERM and the end of its processes."""
    pod = replica_template(overlay)["spec"]
    environment = {each["name"]: each["value"] for each in replica(overlay)["env"]}
    seconds = float(environment["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"])
    assert seconds > settings(overlay).drain_seconds + DEREGISTER_SECONDS
    assert pod["terminationGracePeriodSeconds"] > seconds + 10


@pytest.mark.parametrize("overlay", ON_RAY)
def test_disruption_budgets_can_be_computed_and_let_a_replica_go(overlay: str) -> None:
    """Kubernetes computes `maxUnavailable` by the scale of who owns the pods; a RayCluster has
    none, and nothing would ever be evicted."""
    objects = render(overlay)
    budgets = [each["spec"] for each in objects if each["kind"] == "PodDisruptionBudget"]
    assert len(budgets) == 2
    for budget in budgets:
        assert set(budget) == {"minAvailable", "selector"}
        assert isinstance(budget["minAvailable"], int)
    (group,) = find(objects, "RayService")["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    kept = find(objects, "PodDisruptionBudget")["spec"]["minAvailable"]
    assert 0 < kept < group["minReplicas"]
