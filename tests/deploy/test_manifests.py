"""Every overlay renders, is valid to the last field, and is closed where it should be."""

import copy
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

from tests.deploy.manifests import (
    DEPLOY,
    OVERLAYS,
    TLS,
    Manifest,
    check,
    find,
    make_certificate,
    openssl,
    pod_templates,
    render,
)
from tests.deploy.overlays import ALONE, APP, COMPONENT, HEAD, ON_RAY, REPLICA


def test_the_overlays_are_those_that_are_documented() -> None:
    assert sorted(ON_RAY + ALONE) == OVERLAYS


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_every_object_is_valid(overlay: str) -> None:
    objects = render(overlay)
    for manifest in objects:
        check(manifest)
    names = [(each["kind"], each["metadata"]["name"]) for each in objects]
    assert len(names) == len(set(names))
    for each in objects:
        if each["kind"] != "Namespace":
            assert each["metadata"]["namespace"] == "headroom", each["metadata"]["name"]


def _head_container(ray_service: Manifest) -> Manifest:
    template = ray_service["spec"]["rayClusterConfig"]["headGroupSpec"]["template"]
    container: Manifest = template["spec"]["containers"][0]
    return container


@pytest.mark.parametrize(
    "mistake",
    [
        lambda service: service["spec"].update(serveConfig=""),
        lambda service: service["spec"]["rayClusterConfig"].update(rayVersion=2.6),
        lambda service: _head_container(service).update(readynessProbe={}),
        lambda service: _head_container(service)["securityContext"].update(runAsUser="root"),
    ],
)
def test_a_mistake_in_a_ray_service_is_found(mistake: Callable[[Manifest], None]) -> None:
    service = copy.deepcopy(find(render("cpu"), "RayService"))
    mistake(service)
    with pytest.raises(jsonschema.ValidationError):
        check(service)


def test_a_mistake_in_a_deployment_and_an_unknown_kind_are_found() -> None:
    deployment = copy.deepcopy(find(render("dev"), "Deployment"))
    deployment["spec"]["template"]["spec"]["enableServiceLink"] = False
    with pytest.raises(kubernetes_validate.ValidationError):
        check(deployment)
    with pytest.raises(kubernetes_validate.SchemaNotFoundError):
        check({"apiVersion": "example.com/v1", "kind": "Nothing", "metadata": {"name": "x"}})


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_every_pod_is_confined(overlay: str) -> None:
    found = list(pod_templates(render(overlay)))
    assert found
    for component, template in found:
        pod = template["spec"]
        assert template["metadata"]["labels"] == {APP: "headroom", COMPONENT: component}
        # A Service named headroom would set HEADROOM_* variables, which are settings.
        assert pod["enableServiceLinks"] is False
        assert pod["automountServiceAccountToken"] is (component == "head")
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["runAsUser"] == _image_user()
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        for container in pod["containers"] + pod.get("initContainers", []):
            context = container["securityContext"]
            assert context["allowPrivilegeEscalation"] is False
            assert context["readOnlyRootFilesystem"] is True
            assert context["capabilities"] == {"drop": ["ALL"]}
            resources = container["resources"]
            assert resources["requests"]["memory"] == resources["limits"]["memory"]
            mounts = {mount["name"] for mount in container["volumeMounts"]}
            assert mounts <= {volume["name"] for volume in pod["volumes"]}


def _image_user() -> int:
    """Of every image; root only installs Debian's packages."""
    users = re.findall(r"^(FROM|USER) (.+)$", (DEPLOY.parent / "Dockerfile").read_text(), re.M)
    assert all(users[at + 1][0] == "USER" for at, each in enumerate(users) if each[1] == "0:0")
    (user,) = {name for kind, name in users if kind == "USER"} - {"0:0"}
    return int(user.split(":")[0])


def _matches(selector: Manifest, labels: Manifest) -> bool:
    wanted: Manifest = selector.get("matchLabels", {})
    return wanted.items() <= labels.items()


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_only_named_ports_are_open_to_others(overlay: str) -> None:
    """Ray's ports and those of replicas are open within the Ray cluster alone."""
    objects = render(overlay)
    policies = [each for each in objects if each["kind"] == "NetworkPolicy"]
    closed = find(objects, "NetworkPolicy", "default-deny")["spec"]
    assert closed == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}
    for labels, expected in (
        (REPLICA, {9000, 9464}),
        (HEAD, {8265, 8000} if overlay in ON_RAY else set()),
    ):
        open_ports: set[int] = set()
        for policy in policies:
            spec = policy["spec"]
            for rule in spec.get("ingress", []):
                inside = all(source.get("namespaceSelector") is None for source in rule["from"])
                if inside:
                    assert rule["from"] == [{"podSelector": spec["podSelector"]}]
                elif _matches(spec["podSelector"], labels):
                    open_ports |= {port["port"] for port in rule["ports"]}
        assert open_ports == expected


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_every_secret_that_is_mounted_has_an_example(overlay: str) -> None:
    """Names and keys, and in the overlay itself only where it is for trying out."""
    file = DEPLOY / "kubernetes" / "components" / "example-secrets" / "secrets.yaml"
    examples = {
        each["metadata"]["name"]: each["stringData"]
        for each in yaml.safe_load_all(file.read_text())
    }
    for _, template in pod_templates(render(overlay)):
        for volume in template["spec"]["volumes"]:
            if "secret" in volume:
                assert volume["secret"]["secretName"] in examples
    shipped = {each["metadata"]["name"] for each in render(overlay) if each["kind"] == "Secret"}
    assert shipped == (set(examples) if overlay == "dev" else set())
    if overlay in ON_RAY:
        service = find(render(overlay), "RayService")["spec"]["rayClusterConfig"]
        assert service["authOptions"] == {"mode": "token", "secretName": "ray-token"}
        assert set(examples["ray-token"]) == {"auth_token"}  # the key that KubeRay reads


@pytest.mark.parametrize("overlay", [name for name in OVERLAYS if name != "dev"])
def test_rules_and_dashboard_are_the_files_of_this_repository(overlay: str) -> None:
    rules = find(render(overlay), "ConfigMap", "headroom-rules")["data"]
    dashboard = find(render(overlay), "ConfigMap", "headroom-dashboard")
    files: dict[str, Any] = {**rules, **dashboard["data"]}
    assert set(files) == {"recording.yml", "alerts.yml", "headroom.json"}
    for name, text in files.items():
        folder = "grafana" if name.endswith(".json") else "prometheus"
        assert text == (DEPLOY / folder / name).read_text()
    assert dashboard["metadata"]["labels"] == {"grafana_dashboard": "1"}


@pytest.mark.parametrize("component", ["head", "replica"])
def test_every_pod_of_a_ray_cluster_makes_a_certificate_of_its_own(
    component: str, tmp_path: Path
) -> None:
    """Its script, run: the certificate names the pod's address and is signed by the authority."""
    template = dict(pod_templates(render("cpu")))[component]
    (container,) = template["spec"]["initContainers"]
    make_certificate(template, tmp_path, "10.1.2.3")
    verify = ("verify", "-CAfile", tmp_path / "ca.crt", "-verify_ip")
    openssl(*verify, "10.1.2.3", tmp_path / "tls.crt")
    with pytest.raises(subprocess.CalledProcessError):
        openssl(*verify, "10.1.2.4", tmp_path / "tls.crt")
    mounts = {each["name"]: each["mountPath"] for each in container["volumeMounts"]}
    assert mounts == {"ray-ca": "/etc/ray-ca", "ray-tls": TLS}
    main = template["spec"]["containers"][0]
    files = {each["value"] for each in main["env"] if each["name"].startswith("RAY_TLS_")}
    assert {Path(file).parent for file in files} == {Path(TLS)}
    assert {Path(file).name for file in files} <= {file.name for file in tmp_path.iterdir()}


def test_the_documented_authority_of_a_ray_cluster_outlives_what_it_signs(tmp_path: Path) -> None:
    """Pods sign certificates for a year when they start, whenever that is."""
    page = (DEPLOY.parent / "docs" / "deploy.md").read_text()
    (command,) = re.findall(r"`(openssl req\s+-x509[^`]+ -out ray-ca\.crt)`", page)
    subprocess.run(command.split(), cwd=tmp_path, capture_output=True, check=True)
    openssl("x509", "-in", tmp_path / "ray-ca.crt", "-checkend", str(9 * 365 * 24 * 3600))
