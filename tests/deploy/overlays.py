"""What an overlay says of its pods, and what its server is set to."""

from typing import Any

import yaml

from service.config import ServiceConfig
from tests.deploy.manifests import Manifest, find, pod_templates, render

APP = "app.kubernetes.io/name"
COMPONENT = "app.kubernetes.io/component"
REPLICA = {APP: "headroom", COMPONENT: "replica"}
HEAD = {APP: "headroom", COMPONENT: "head"}
ON_RAY = ("cpu", "gpu")
ALONE = ("dev", "plain")


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
