"""The manifests as Kubernetes would get them, and strict schemas for every kind among them."""

import functools
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import yaml

KUBERNETES = "1.37"
DEPLOY = Path(__file__).parent.parent.parent / "deploy"
OVERLAYS = sorted(path.parent.name for path in DEPLOY.glob("kubernetes/overlays/*/*ization.yaml"))
SCHEMAS = Path(__file__).parent / "schemas"
TLS = "/etc/ray-tls"

Manifest = dict[str, Any]


@functools.cache
def render(overlay: str) -> tuple[Manifest, ...]:
    """All objects of an overlay of ours."""
    return render_directory(DEPLOY / "kubernetes" / "overlays" / overlay)


def render_directory(directory: Path) -> tuple[Manifest, ...]:
    """All objects of a kustomization, by kustomize."""
    done = subprocess.run(
        [Path(sys.executable).parent / "kubectl", "kustomize", directory],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert not done.stderr, done.stderr  # what kustomize calls deprecated
    return tuple(yaml.load_all(done.stdout, Loader=yaml.CSafeLoader))


def find(objects: tuple[Manifest, ...], kind: str, name: str = "headroom") -> Manifest:
    (found,) = (o for o in objects if o["kind"] == kind and o["metadata"]["name"] == name)
    return found


def pod_templates(objects: tuple[Manifest, ...]) -> Iterator[tuple[str, Manifest]]:
    """Name and template of every pod that will run, those of a RayService too."""
    for each in objects:
        if each["kind"] == "Deployment":
            yield "replica", each["spec"]["template"]
        elif each["kind"] == "RayService":
            cluster = each["spec"]["rayClusterConfig"]
            yield "head", cluster["headGroupSpec"]["template"]
            for group in cluster["workerGroupSpecs"]:
                yield "replica", group["template"]


def make_certificate(template: Manifest, directory: Path, address: str) -> None:
    """What a pod of the Ray cluster does before it starts: a certificate for its own address.

    Args:
        directory: in place of `TLS`.
    """
    authority = directory / "authority"
    authority.mkdir()
    openssl(
        *("req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=ray"),
        *("-keyout", authority / "tls.key", "-out", authority / "tls.crt"),
    )
    (container,) = template["spec"]["initContainers"]
    (script,) = container["args"]
    script = script.replace("/etc/ray-ca", str(authority)).replace(TLS, str(directory))
    subprocess.run(
        [*container["command"], script],
        env={"PATH": os.environ["PATH"], "POD_IP": address},
        capture_output=True,
        check=True,
    )


def openssl(*arguments: str | Path) -> None:
    subprocess.run(["openssl", *arguments], capture_output=True, check=True)


def check(manifest: Manifest) -> None:
    """Refuse what the API server would refuse, or drop without a word.

    Raises:
        jsonschema.ValidationError, kubernetes_validate.ValidationError: a field is wrong or not
            known.
        kubernetes_validate.SchemaNotFoundError: nobody has a schema for the kind.
    """
    schema = custom_kinds().get((manifest["apiVersion"], manifest["kind"]))
    if schema is None:
        kubernetes_validate.validate(manifest, KUBERNETES, strict=True)
    else:
        jsonschema.Draft202012Validator(schema).validate(manifest)


@functools.cache
def custom_kinds() -> dict[tuple[str, str], Manifest]:
    """Strict schemas of the kinds that Kubernetes does not have itself."""
    files = (json.loads(file.read_text()) for file in SCHEMAS.glob("*.json"))
    return {(each["apiVersion"], each["kind"]): _kind(each["schema"]) for each in files}


def _kind(schema: Manifest) -> Manifest:
    """Of the whole object; its metadata is the API server's to check."""
    strict: Manifest = _strict(schema)
    strict["properties"]["metadata"] = {"type": "object", "required": ["name"]}
    return strict


def _strict(schema: Any) -> Any:
    """The JSON schema of an OpenAPI v3 schema, in which an unknown field is an error."""
    if isinstance(schema, list):
        return [_strict(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    strict = {name: _strict(value) for name, value in schema.items() if name != "properties"}
    strict.pop("format", None)  # names such as int32, which say nothing here
    if "properties" in schema:
        strict["properties"] = {name: _strict(each) for name, each in schema["properties"].items()}
        if not schema.get("x-kubernetes-preserve-unknown-fields"):
            strict.setdefault("additionalProperties", False)
    if schema.get("x-kubernetes-int-or-string"):
        strict["type"] = ["integer", "string"]
        strict.pop("anyOf", None)
    if schema.get("nullable"):
        strict["type"] = [schema["type"], "null"]
    return strict


def unknown_keys(given: Any, read: Any, path: str = "") -> list[str]:
    """What a configuration says and its reader did not take up."""
    if isinstance(given, dict) and isinstance(read, dict):
        missing = [f"{path}{name}" for name in given if name not in read]
        return missing + [
            unknown
            for name in given.keys() & read.keys()
            for unknown in unknown_keys(given[name], read[name], f"{path}{name}.")
        ]
    if isinstance(given, list) and isinstance(read, list):
        return [
            unknown
            for index, (one, other) in enumerate(zip(given, read, strict=True))
            for unknown in unknown_keys(one, other, f"{path}{index}.")
        ]
    return []
