"""`headroom serve` as a person runs it: what it prints, how it fails, and what it leaves."""

import json
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner, Result

from service.cli import app
from service.client import Client
from service.runtimes.ray_environment import free_ports
from tests.integration.processes import Process

_CLI = ("-c", "from service.cli import app; app()")


def _run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *_CLI, *arguments], capture_output=True, text=True, timeout=120
    )


def _refused(*arguments: str) -> Result:
    """What ends before it starts anything needs no process of its own."""
    return CliRunner().invoke(app, list(arguments))


@pytest.mark.parametrize(
    ("runtime", "stop"),
    [
        ("standalone", signal.SIGINT),
        pytest.param("ray", signal.SIGTERM, marks=pytest.mark.ray),
    ],
)
def test_serve_generate_and_stop(model_path: Path, runtime: str, stop: signal.Signals) -> None:
    port, http_port, metrics_port = free_ports(3)
    target = f"127.0.0.1:{port}"
    ports = ["--port", port, "--http-port", http_port, "--metrics-port", metrics_port]
    arguments = ["--runtime", runtime, *map(str, ports)]
    with Process(*_CLI, "serve", "--model", str(model_path), *arguments) as server:
        ready = server.wait_for(lambda line: line.startswith("ready"))
        assert f"grpc://{target}" in ready
        facts = {line.split(maxsplit=1)[0]: line for line in server.lines}
        assert "tiny-gqa (llama" in facts["model"]
        assert facts["heads"].endswith("h4kv2d16 x 2 layers")
        assert "blocks of 16" in facts["kv"]
        assert "MiB" in facts["kv"]
        assert facts["metrics"].split()[1] == f"http://127.0.0.1:{metrics_port}/metrics"

        answer = _run("generate", "--target", target, "--max-tokens", "5", "--json", "hello")
        assert answer.returncode == 0, answer.stderr
        generated = json.loads(answer.stdout)
        assert len(generated["token_ids"]) == 5
        assert generated["reason"] == "FINISH_REASON_LENGTH"
        described = json.loads(_run("model", "--target", target, "--json").stdout)
        assert described["model"]["layers"][0]["num_kv_heads"] == 2
        assert described["load"]["kv_blocks_used"] == 0
        health = _run("health", "--target", target)
        assert (health.returncode, health.stdout) == (0, "serving\n")
        refused = _run("generate", "--target", target, "--temperature", "200", "x")
        assert refused.returncode == 1
        assert "sampling.temperature is 200; allowed: 0 to 100" in refused.stderr

        family = server.family()
        with Client(target) as client:
            stream = client.generate([1], max_tokens=600, temperature=0, ignore_eos=True)
            texts = iter(stream)
            next(texts)
            server.signal(stop)
            for _ in texts:  # an open stream finishes
                pass
        assert len(stream.token_ids) == 600
        assert server.wait() == 0, server.output
        assert server.lines[-1] == "stopped"
        assert not [line for line in server.lines if "failed" in line], "an orderly end"
        for code in ("OK", "INVALID_ARGUMENT"):
            assert any(f"code={code} " in line for line in _rpc_lines(server, facts)), code
        assert psutil.wait_procs(family, timeout=20)[1] == []
        for number in (port, http_port, metrics_port):
            socket.create_server(("127.0.0.1", number)).close()
        gone = _run("health", "--target", target, "--timeout", "0.2")
        assert gone.returncode == 1
        assert gone.stderr.startswith("error: UNAVAILABLE: ")


def _rpc_lines(server: Process, facts: dict[str, str]) -> list[str]:
    """Where docs/logs-and-traces.md says that they are."""
    lines = server.lines
    if "logs" in facts:
        files = Path(facts["logs"].split()[1]).glob("worker-*.err")
        lines = [line for file in files for line in file.read_text().splitlines()]
    wanted = r"20\S+Z \[info +\] rpc .*method=headroom\.v1\.GenerationService/Generate .*"
    return [line for line in lines if re.fullmatch(wanted, line)]


@pytest.mark.parametrize("flag", ["--port", "--http-port", "--metrics-port"])
def test_a_taken_port_is_named(model_path: Path, flag: str) -> None:
    ports = dict(zip(("--port", "--http-port", "--metrics-port"), free_ports(3), strict=True))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        ports[flag] = taken.getsockname()[1]
        arguments = [part for name, port in ports.items() for part in (name, str(port))]
        answer = _refused("serve", "--model", str(model_path), *arguments)
    assert answer.exit_code == 1
    expected = f"cannot listen on 127.0.0.1:{ports[flag]} ({flag}): Address already in use"
    assert answer.stderr == f"error: {expected}\n"


def _copy(model_path: Path, target: Path) -> Path:
    target.mkdir()
    for file in model_path.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    return target


def _truncate(path: Path) -> str:
    weights = path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    return "model.safetensors is not a readable safetensors file"


def _other_shape(path: Path) -> str:
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "num_key_value_heads": 4}))
    return (
        "model.layers.0.self_attn.k_proj.weight has shape [32, 64], "
        "the configuration needs [64, 64]"
    )


def _missing_tensor(path: Path) -> str:
    tensors = load_file(path / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, path / "model.safetensors")
    return "missing model.layers.1.mlp.up_proj.weight"


def _no_tokenizer(path: Path) -> str:
    (path / "tokenizer.json").unlink()
    return "tokenizer.json is missing"


def _small_vocabulary(path: Path) -> str:
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "vocab_size": 258}))
    return "embed_tokens.weight has shape [259, 64]"


def _uneven_groups(path: Path) -> str:
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "num_key_value_heads": 3}))
    return "num_kv_heads is 3; allowed: a divisor of num_heads=4"


@pytest.mark.parametrize(
    "damage",
    [_truncate, _other_shape, _missing_tensor, _no_tokenizer, _small_vocabulary, _uneven_groups],
)
def test_a_damaged_checkpoint_is_refused_in_one_line(
    model_path: Path, tmp_path: Path, damage: Callable[[Path], str]
) -> None:
    path = _copy(model_path, tmp_path / "damaged")
    expected = damage(path)
    answer = _refused("serve", "--model", str(path), "--port", str(free_ports(1)[0]))
    assert answer.exit_code == 1
    assert answer.stderr.startswith("error: ")
    assert expected in answer.stderr
    assert answer.stderr.count("\n") == 1
    assert answer.stdout == ""


def test_settings_that_are_wrong_exit_with_2(model_path: Path, tmp_path: Path) -> None:
    file = tmp_path / "settings.yaml"
    file.write_text("engine:\n  max_num_seq: 3\n")
    for arguments, expected in (
        (["--config", str(file)], "max_num_seq"),
        (["--config", str(tmp_path / "none.yaml")], "is not a file"),
        (["--port", "70000"], "port is 70000"),
        (["--port", "8000"], "port and http_port are both 8000"),
        (["--metrics-port", "9000"], "port is 9000, which is one of the ports from metrics_port"),
        (["--metrics-port", "0", "--metrics-targets", "x"], "metrics_targets is set"),
        (["--replicas", "0"], "replicas is 0"),
        (["--runtime", "standalone", "--replicas", "2"], "replicas is 2; allowed: 1"),
        (["--host", "0.0.0.0"], "where others reach it, without tokens and tls_cert"),
        (["--tls-cert", "x"], "tls_cert and tls_key belong together"),
        (["--runtime", "docker"], "docker"),
        (["--modle", "x"], "--modle"),
    ):
        answer = _refused("serve", "--model", str(model_path), *arguments)
        assert answer.exit_code == 2, arguments
        assert expected in answer.stderr


@pytest.mark.parametrize(
    ("models", "expected"),
    [
        ("a=x y", "--model is 'y'; allowed, if there are several: NAME=DIRECTORY"),
        ("a=x b=", "--model is 'b='"),
        ("a=x a=y", "--model names application 'a' 2 times; allowed: once"),
        ("a=x b!=y", "should match pattern"),
    ],
)
def test_applications_that_are_wrong_exit_with_2(models: str, expected: str) -> None:
    arguments = [part for model in models.split() for part in ("--model", model)]
    answer = _refused("serve", *arguments)
    assert answer.exit_code == 2
    assert expected in answer.stderr


def test_limits_that_the_model_cannot_keep_are_refused(model_path: Path, tmp_path: Path) -> None:
    file = tmp_path / "settings.yaml"
    file.write_text("engine:\n  max_model_len: 5000\n")
    answer = _refused("serve", "--model", str(model_path), "--config", str(file))
    assert answer.exit_code == 1
    assert "max_model_len is 5000; allowed: at most 4096" in answer.stderr


def test_every_command_explains_itself_with_an_example() -> None:
    for command in ("serve", "generate", "model", "health", "bench", "train-demo"):
        answer = _refused(command, "--help")
        assert answer.exit_code == 0
        assert f"Example: headroom {command}" in answer.stdout


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--tokens", "none.yaml"], "none.yaml cannot be read"),
        (["--tls-cert", "none.crt", "--tls-key", "none.key"], "tls_cert none.crt cannot be read"),
    ],
)
def test_files_of_secrets_that_cannot_be_used_are_named(
    model_path: Path, flags: list[str], expected: str
) -> None:
    answer = _refused("serve", "--model", str(model_path), *flags)
    assert answer.exit_code == 1
    assert expected in answer.stderr
    assert answer.stderr.count("\n") == 1
