"""Settings: where they come from, in which order, and what a wrong one says."""

import socket
from pathlib import Path

import pytest

from models.checkpoints.bundled import BUNDLED_MODELS
from service.config import ServiceConfig, SettingsError, load_config


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "settings.yaml"
    path.write_text(
        "port: 1\nhost: file\nallow_insecure: true\nengine:\n  max_num_seqs: 1\n  block_size: 8\n"
    )
    return path


def test_flags_win_over_environment_over_file_over_defaults(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HEADROOM_PORT", "2")
    monkeypatch.setenv("HEADROOM_HOST", "environment")
    monkeypatch.setenv("HEADROOM_ENGINE__MAX_NUM_SEQS", "2")
    config = load_config(file, port=3, model=None)
    assert (config.port, config.host, config.http_port) == (3, "environment", 8000)
    assert (config.engine.max_num_seqs, config.engine.block_size) == (2, 8)
    assert config.model_path == BUNDLED_MODELS["demo"]


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("prot: 9000", "prot"),
        ("engine: {max_num_seq: 3}", "max_num_seq"),
        ("engine: {num_blocks: many}", "engine.num_blocks"),
        ("engine: {block_size: 0}", "block_size is 0; allowed: 1 or more"),
        ("engine: {kernel: magic}", "engine.kernel"),
        ("engine: {kv_cache_dtype: fp8}", "engine.kv_cache_dtype"),
        ("runtime: docker", "runtime"),
        ("application: 'a b'", "application"),
        ("- a list", "cannot be read"),
        ("port: [", "cannot be read"),
        ("model: {}", "allowed: a directory, or one for each application"),
        ("model: {'a b': x}", "should match pattern"),
        ("runtime: standalone\nmodel: {a: x, b: y}", "model names 2 applications; allowed: 1"),
        ("runtime: standalone\nreplicas: 2", "replicas is 2; allowed: 1 with the standalone"),
        ("runtime: standalone\nray_address: a:1", "ray_address is set; allowed: only with the Ray"),
        (
            "ray_address: a:1\nmetrics_targets: x",
            "metrics_targets is set; allowed: only without ray_address",
        ),
        ("ray_address: ray://a", "ray_address"),
        ("tls_cert: x", "tls_cert and tls_key belong together; allowed: both or none"),
        ("tls_key: x", "tls_cert and tls_key belong together"),
        ("client_ca: x", "client_ca is set; allowed: only with tls_cert and tls_key"),
        ("host: 0.0.0.0", "host is '0.0.0.0', where others reach it, without tokens and tls_cert"),
        ("host: '::'\ntokens: x", "host is '::', where others reach it, without tls_cert; allowed"),
        ("host: gpu-7\ntls_cert: x\ntls_key: x", "host is 'gpu-7', .* without tokens; allowed"),
    ],
)
def test_a_wrong_setting_is_named(tmp_path: Path, text: str, named: str) -> None:
    file = tmp_path / "settings.yaml"
    file.write_text(text)
    with pytest.raises(SettingsError, match=named.replace("(", r"\(")):
        load_config(file)


@pytest.mark.parametrize(
    "text",
    [
        "host: 127.0.0.2",
        "host: '::1'",
        "host: localhost",
        "host: 0.0.0.0\ntokens: x\ntls_cert: x\ntls_key: x",
        "host: 0.0.0.0\nallow_insecure: true",
    ],
)
def test_what_is_safe_or_wanted_is_served(tmp_path: Path, text: str) -> None:
    file = tmp_path / "settings.yaml"
    file.write_text(text)
    load_config(file)


def test_settings_survive_the_way_to_a_replica(file: Path) -> None:
    config = load_config(file)
    assert ServiceConfig(**config.model_dump()).model_dump() == config.model_dump()


def test_applications_share_all_but_their_model(tmp_path: Path) -> None:
    file = tmp_path / "settings.yaml"
    file.write_text("model: {mha: ./a, mqa: ./b}\nreplicas: 2\n")
    config = load_config(file)
    assert [(one.application, one.model, one.replicas) for one in config.applications] == [
        ("mha", "./a", 2),
        ("mqa", "./b", 2),
    ]
    alone = load_config(model="demo")
    assert alone.applications == (alone,)


@pytest.mark.parametrize(
    ("host", "reached"),
    [
        ("127.0.0.1", "127.0.0.1"),
        ("::1", "[::1]"),
        ("gpu-7", "gpu-7"),
        ("0.0.0.0", socket.gethostname()),
        ("::", socket.gethostname()),
    ],
)
def test_metrics_are_announced_where_others_reach_them(host: str, reached: str) -> None:
    config = load_config(host=host, metrics_port=9500, replicas=2, allow_insecure=True)
    assert config.metrics_addresses == {"headroom": [f"{reached}:9500", f"{reached}:9501"]}


def test_every_setting_is_documented() -> None:
    page = (Path(__file__).parents[2] / "docs" / "settings.md").read_text()
    engine = type(ServiceConfig().engine).__dataclass_fields__
    for name in [*ServiceConfig.model_fields, *engine]:
        assert name in page, name
