"""What goes into the image, how it is started, and what is said of it."""

import argparse
import re
import tomllib
from pathlib import Path

import pytest
import yaml

from loadtests.options import add_options
from models.checkpoints.bundled import BUNDLED_MODELS
from service.config import ServiceConfig
from service.doctor.checks import LEAST_SHARED_MEMORY
from tests.deploy.manifests import DEPLOY, OVERLAYS, pod_templates, render
from tests.deploy.overlays import replica
from tests.loadtests.test_load import Parser

ROOT = DEPLOY.parent
DOCKERFILE = (ROOT / "Dockerfile").read_text()
SETUPTOOLS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
PACKAGE_DATA: dict[str, list[str]] = SETUPTOOLS["package-data"]


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
    assert f"subjectAltName=DNS:localhost,DNS:{host},IP:127.0.0.1 " in page
    assert "tokens.yaml 2> deploy/docker/secrets/locust.token" in page


def _docker_runs() -> list[tuple[argparse.Namespace, list[str]]]:
    """Options of every `docker run` of docs/deploy.md, and what comes after the image."""
    parser = argparse.ArgumentParser()
    for flag in ("--rm", "--read-only"):
        parser.add_argument(flag, action="store_true", required=True)
    for flag in ("--publish", "--tmpfs", "--shm-size"):
        parser.add_argument(flag, required=True)
    for flag in ("--volume", "--env"):
        parser.add_argument(flag, action="append", default=[])
    parser.add_argument("image")
    page = (ROOT / "docs" / "deploy.md").read_text()
    commands = re.findall(r"^docker run (.+(?:(?<=\\)\n.+)*)", page, re.MULTILINE)
    return [
        (parser.parse_args(options.split()), serve.split())
        for options, _, serve in (
            command.replace("\\\n", "").replace('"', "").partition(" serve ")
            for command in commands
        )
    ]


def test_commands_that_start_the_image_give_it_what_it_needs() -> None:
    (first, flags), (second, (_, settings)) = _docker_runs()
    for given in (first, second):
        assert int(given.shm_size.removesuffix("m")) * 2**20 >= LEAST_SHARED_MEMORY
        assert f"FROM runtime AS {given.image.partition(':')[2]}\n" in DOCKERFILE
    assert flags == ["--host", "0.0.0.0", "--allow-insecure"]
    port = ServiceConfig(host="0.0.0.0", allow_insecure=True).port
    assert first.publish == f"127.0.0.1:{port}:{port}"

    mounts = dict(reversed(volume.removesuffix(":ro").split(":")) for volume in second.volume)
    source = mounts[settings].replace("$PWD", str(ROOT))
    config = ServiceConfig(**yaml.safe_load(Path(source).read_text()))
    assert (config.host, second.publish) == ("0.0.0.0", f"{config.port}:{config.port}")
    # The health check of the image asks there, and is told by variables what to show and to trust.
    assert config.port == port
    told = dict(each.split("=") for each in second.env)
    assert set(told) == {"HEADROOM_TOKEN_FILE", "HEADROOM_TLS_CA"}
    for file in (config.tokens, config.tls_cert, config.tls_key, *map(Path, told.values())):
        assert file is not None
        assert str(file.parent) in mounts


def test_the_image_for_gpus_has_what_triton_compiles_its_driver_with() -> None:
    (_, stage) = DOCKERFILE.split("\nFROM runtime AS cuda\n")
    (packages,) = re.findall(r"--no-install-recommends (.+) \\", stage)
    assert packages.split() == ["gcc", "libc6-dev", "python3-dev"]


def _matches(pattern: str, path: str) -> bool:
    regex = re.escape(pattern).replace(r"\*\*/", "(.*/)?").replace(r"\*", "[^/]*")
    return re.fullmatch(regex, path) is not None


def _is_sent(path: str) -> bool:
    """Whether a builder gets a file of the repository, by .dockerignore: the last line that names
    it, or a folder that it is in, decides."""
    parts = path.split("/")
    names = ["/".join(parts[: end + 1]) for end in range(len(parts))]
    sent = True
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        if not line.startswith("#") and any(_matches(line.lstrip("!"), name) for name in names):
            sent = line.startswith("!")
    return sent


def _is_packaged(path: str) -> bool:
    """Whether setuptools takes a file of data along."""
    package, _, file = path.partition("/")
    return any(_matches(pattern, file) for pattern in PACKAGE_DATA.get(package, []))


def test_the_image_is_built_from_every_package_and_its_data() -> None:
    packages = [name.rstrip("*") for name in SETUPTOOLS["packages"]["find"]["include"]]
    needed = [f"{name}/__init__.py" for name in packages]
    for name, patterns in PACKAGE_DATA.items():
        for pattern in patterns:
            found = [str(file.relative_to(ROOT)) for file in (ROOT / name).glob(pattern)]
            assert found, f"{name}/{pattern}"
            needed += found
    for path in [*needed, "pyproject.toml", "setup.py", "models/cpu/fused.cpp"]:
        assert _is_sent(path), path


@pytest.mark.parametrize(
    "path",
    [
        "deploy/docker/secrets/tls.key",
        "deploy/docker/secrets/tokens.yaml",
        "models/demo/mha.training/state.safetensors",
        "models/demo/gqa.merged/model.safetensors",
        "models/cpu/_operations_avx2.so",
        "service/__pycache__/cli.cpython-311.pyc",
        "loadtests/results/windows.json",
        ".git/config",
        "ray.token",
    ],
)
def test_secrets_and_leftovers_go_into_no_image_and_no_package(path: str) -> None:
    assert not _is_sent(path)
    assert not _is_packaged(path)


def test_all_data_beside_modules_is_packaged() -> None:
    """And so found by a module that was installed, where there is no repository."""
    assert _is_packaged("deploy/haproxy/edge.cfg")
    for package in ("models", "service", "protos", "loadtests"):
        for file in (ROOT / package).rglob("*.*"):
            path = str(file.relative_to(ROOT))
            if _is_sent(path) and file.is_file() and file.suffix not in (".py", ".cpp", ".h"):
                assert _is_packaged(path), path


def test_the_test_of_the_image_asks_for_every_bundled_model() -> None:
    script = (DEPLOY / "docker" / "test.sh").read_text()
    (models,) = re.findall(r"^for model in (.+); do$", script, re.MULTILINE)
    assert set(models.split()) == set(BUNDLED_MODELS)


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
