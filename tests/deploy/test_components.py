"""Components that no overlay of ours includes: valid, and good for an overlay of one's own."""

import copy
import os
from pathlib import Path
from urllib.parse import urlsplit

import jsonschema
import pytest
import yaml

from service.config import ServiceConfig
from tests.deploy.manifests import (
    DEPLOY,
    Manifest,
    check,
    find,
    pod_templates,
    render,
    render_directory,
)
from tests.deploy.overlays import REPLICA

COMPONENTS = DEPLOY / "kubernetes" / "components"
ENDPOINT = "HEADROOM_OTLP_ENDPOINT"


def render_own(directory: Path, overlay: str, *components: str) -> tuple[Manifest, ...]:
    """An overlay that begins with one of ours and adds components, as docs/deploy.md says."""
    ours = Path(os.path.relpath(DEPLOY / "kubernetes", directory.resolve()))
    own = {
        "apiVersion": "kustomize.config.k8s.io/v1beta1",
        "kind": "Kustomization",
        "namespace": "headroom",
        "resources": [str(ours / "overlays" / overlay)],
        "components": [str(ours / "components" / name) for name in components],
    }
    (directory / "kustomization.yaml").write_text(yaml.safe_dump(own))
    return render_directory(directory)


def test_autoscaling_by_keda_is_valid_and_a_mistake_in_it_is_found(tmp_path: Path) -> None:
    scaled = find(render_own(tmp_path, "dev", "keda"), "ScaledObject")
    check(scaled)
    mistaken = copy.deepcopy(scaled)
    mistaken["spec"]["maxReplicas"] = 8
    with pytest.raises(jsonschema.ValidationError):
        check(mistaken)


def _environment(template: Manifest) -> dict[str, str]:
    container = template["spec"]["containers"][0]
    return {each["name"]: each["value"] for each in container.get("env", [])}


@pytest.mark.parametrize("overlay", ["plain", "cpu", "gpu"])
def test_traces_may_leave_a_replica_for_the_collector_and_for_nothing_else(
    tmp_path: Path, overlay: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    objects = render_own(tmp_path, overlay, "tracing")
    for manifest in objects:
        check(manifest)
    policy = find(objects, "NetworkPolicy", "tracing")
    assert policy["metadata"]["namespace"] == "headroom"
    assert policy["spec"]["podSelector"]["matchLabels"] == REPLICA
    assert policy["spec"]["policyTypes"] == ["Egress"]
    (rule,) = policy["spec"]["egress"]
    (peer,), (port,) = rule["to"], rule["ports"]
    (namespace,) = peer["namespaceSelector"]["matchLabels"].values()
    pods = [_environment(template) for _, template in pod_templates(objects)]
    before = [_environment(template) for _, template in pod_templates(render(overlay))]
    (endpoint,) = {pod.pop(ENDPOINT) for pod in pods}
    assert pods == before
    address = urlsplit(endpoint)
    assert address.hostname is not None
    assert address.hostname.split(".")[1:] == [namespace]
    assert (port["protocol"], port["port"]) == ("TCP", address.port)
    monkeypatch.setenv(ENDPOINT, endpoint)
    assert ServiceConfig.model_validate({}).otlp_endpoint == endpoint  # as Serve reads arguments
