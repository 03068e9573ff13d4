"""Everything that can be set, read once from flags, environment, file and defaults, in this order.

This is the only place that reads files of settings or environment variables.
"""

import dataclasses
import ipaddress
import os
import socket
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, ValidationError, field_validator, model_validator
from pydantic_settings import (
    BaseSettings,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    YamlConfigSettingsSource,
)

from models.checkpoints.bundled import checkpoint_directory
from service.auth.tokens import TokenEntry
from service.engine.config import EngineConfig
from service.logs import LogFormat, LogLevel

# Variables of commands that call a server, which may be set in the same shell.
_OF_CLIENTS = ("TOKEN", "TOKEN_FILE", "TLS_CA", "TLS_CLIENT_CERT", "TLS_CLIENT_KEY")

ApplicationName = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]


class SettingsError(ValueError):
    """Settings that cannot be used; the message has one line per wrong setting."""


class ServiceConfig(BaseSettings):
    """What `headroom serve` serves, where, and within which limits.

    Environment variables are `HEADROOM_` and the field's name; fields of `engine` are joined by
    two underscores, for example `HEADROOM_ENGINE__MAX_NUM_SEQS`.

    Attributes:
        model: a Hugging Face directory, or `demo` for the bundled model; or several, by the name
            of the application that serves each.
        application: name of the Ray Serve application, if there is one; clients send it as
            metadata.
        host, port: where gRPC is served.
        http_port: where Ray Serve answers HTTP health checks.
        metrics_port: where the first replica serves Prometheus metrics, the others one port up
            each; 0 is nowhere.
        metrics_targets: a file to write for Prometheus that names all replicas' metrics.
        replicas: processes that each hold the model, under Ray Serve; of each application.
        ray_address: HOST:PORT of a running Ray cluster to serve on; None starts one here.
        max_message_bytes: a larger gRPC message is refused before it is parsed.
        attend_max_bytes: inputs, scores and answer of one AttentionService call; more is refused.
        drain_seconds: how long open requests may go on after the server was told to stop.
        stall_seconds: an engine that has work but finishes no step for so long is unhealthy.
        log_format: of log lines on standard error, for people (`text`) or machines (`json`).
        log_level: the least important lines that are written.
        tokens: a file of bearer tokens (see `service.auth.tokens`); with it, every RPC needs one.
        tls_cert, tls_key: the server's certificate, followed by those between it and its authority,
            and its key (PEM); with them gRPC is served over TLS. Read again when they change.
        client_ca: certificates (PEM) of whoever vouches for clients; with it, a client needs one.
        allow_insecure: whether others than this machine may be served without tokens or TLS.
        own_token: the entry of one more token, which `headroom serve` makes for its own questions.
        otlp_endpoint: a collector of traces (OTLP over gRPC), as http://HOST:PORT in the clear or
            https://HOST:PORT; None traces nothing.
        trace_sample_ratio: share of the traces that begin here, where the caller decided nothing.
        engine: limits of each replica's engine.
    """

    model_config = SettingsConfigDict(
        env_prefix="HEADROOM_", env_nested_delimiter="__", extra="forbid", frozen=True
    )

    model: str | dict[ApplicationName, str] = "demo"
    application: ApplicationName = "headroom"
    host: str = "127.0.0.1"
    port: int = Field(9000, ge=1, le=65535)
    http_port: int = Field(8000, ge=1, le=65535)
    metrics_port: int = Field(9464, ge=0, le=65535)
    metrics_targets: Path | None = None
    runtime: Literal["ray", "standalone"] = "ray"
    replicas: int = Field(1, ge=1, le=64)
    ray_address: str | None = Field(None, pattern=r"^[^/\s]+:[0-9]+$")
    max_message_bytes: int = Field(4 * 1024 * 1024, ge=1024, le=2**31 - 1)
    attend_max_bytes: int = Field(64 * 1024 * 1024, ge=1024, le=2**40)
    drain_seconds: float = Field(30.0, ge=0, le=3600)
    stall_seconds: float = Field(30.0, gt=0, le=3600)
    log_format: LogFormat = "text"
    log_level: LogLevel = "info"
    tokens: Path | None = None
    tls_cert: Path | None = None
    tls_key: Path | None = None
    client_ca: Path | None = None
    allow_insecure: bool = False
    own_token: TokenEntry | None = None
    otlp_endpoint: str | None = Field(None, pattern=r"^https?://[^/\s]+$")
    trace_sample_ratio: float = Field(1.0, ge=0, le=1)
    engine: EngineConfig = EngineConfig()

    @property
    def applications(self) -> tuple[Self, ...]:
        """The settings of each application, which has one model."""
        if isinstance(self.model, str):
            return (self,)
        return tuple(
            self.model_copy(
                update={
                    "application": name,
                    "model": model,
                    "metrics_port": self.metrics_port and self.metrics_port + index * self.replicas,
                }
            )
            for index, (name, model) in enumerate(self.model.items())
        )

    @property
    def num_replicas(self) -> int:
        """Of all applications."""
        return self.replicas * len(self.applications)

    @property
    def metrics_ports(self) -> range:
        """Of each replica of an application; empty if metrics are not served."""
        return range(self.metrics_port, self.metrics_port + self.replicas * bool(self.metrics_port))

    @property
    def metrics_addresses(self) -> dict[str, list[str]]:
        """HOST:PORT of each replica's metrics, by application; as others can reach them."""
        return {
            one.application: [f"{_reachable(one.host)}:{port}" for port in one.metrics_ports]
            for one in self.applications
        }

    @property
    def model_path(self) -> Path:
        """The directory of an application's model."""
        assert isinstance(self.model, str), "one of `applications`"
        return checkpoint_directory(self.model)

    @field_validator("model")
    @classmethod
    def _some_model(cls, value: str | dict[str, str]) -> str | dict[str, str]:
        if not value:
            raise ValueError("allowed: a directory, or one for each application")
        return value

    @field_validator("engine", mode="before")
    @classmethod
    def _known_engine_fields(cls, value: object) -> object:
        """Dataclasses ignore fields they do not have; a misspelt limit must not go unnoticed."""
        if isinstance(value, dict):
            known = {field.name for field in dataclasses.fields(EngineConfig)}
            unknown = sorted(set(value) - known)
            if unknown:
                raise ValueError(
                    f"unknown: {', '.join(unknown)}; known: {', '.join(sorted(known))}"
                )
        return value

    @model_validator(mode="after")
    def _one_replica_alone(self) -> Self:
        if self.runtime == "standalone" and self.num_replicas > 1:
            count = len(self.applications)
            several = f"model names {count} applications" if count > 1 else ""
            fact = several or f"replicas is {self.replicas}"
            raise ValueError(f"{fact}; allowed: 1 with the standalone runtime")
        return self

    @model_validator(mode="after")
    def _cluster_of_ray(self) -> Self:
        if self.ray_address is not None and self.runtime == "standalone":
            raise ValueError("ray_address is set; allowed: only with the Ray runtime")
        if self.ray_address is not None and self.metrics_targets is not None:
            raise ValueError("metrics_targets is set; allowed: only without ray_address")
        return self

    @model_validator(mode="after")
    def _two_ports(self) -> Self:
        if self.runtime == "ray" and self.port == self.http_port:
            raise ValueError(f"port and http_port are both {self.port}; allowed: two ports")
        return self

    @model_validator(mode="after")
    def _whole_tls(self) -> Self:
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ValueError("tls_cert and tls_key belong together; allowed: both or none")
        if self.client_ca is not None and self.tls_cert is None:
            raise ValueError("client_ca is set; allowed: only with tls_cert and tls_key")
        return self

    @model_validator(mode="after")
    def _safe_from_others(self) -> Self:
        if _is_loopback(self.host) or self.allow_insecure:
            return self
        missing = [
            setting
            for setting, value in (("tokens", self.tokens), ("tls_cert", self.tls_cert))
            if value is None
        ]
        if missing:
            raise ValueError(
                f"host is {self.host!r}, where others reach it, without {' and '.join(missing)}; "
                "allowed: tokens, tls_cert and tls_key, or a loopback address, or allow_insecure"
            )
        return self

    @model_validator(mode="after")
    def _metrics_have_ports(self) -> Self:
        if self.metrics_targets is not None and not self.metrics_port:
            raise ValueError("metrics_targets is set; allowed: only with a metrics_port, not 0")
        last = self.applications[-1].metrics_ports[-1:]
        if last and last[0] > 65535:
            raise ValueError(
                f"metrics_port is {self.metrics_port}; allowed: at most "
                f"{self.metrics_port - last[0] + 65535}, so that every replica has a port"
            )
        taken = {"port": self.port} | (
            {"http_port": self.http_port} if self.runtime == "ray" else {}
        )
        for name, port in taken.items():
            if any(port in one.metrics_ports for one in self.applications):
                raise ValueError(
                    f"{name} is {port}, which is one of the ports from metrics_port "
                    f"{self.metrics_port} on; allowed: another port"
                )
        return self

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return init_settings, env_settings, YamlConfigSettingsSource(settings_cls)


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _reachable(host: str) -> str:
    """A host as part of an address; a server on all interfaces goes by its machine's name."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host  # a name
    if address.is_unspecified:
        return socket.gethostname()
    return f"[{host}]" if address.version == 6 else host


def _check_environment() -> None:
    """A misspelt variable must not go unnoticed."""
    engine = [f"ENGINE__{field.name.upper()}" for field in dataclasses.fields(EngineConfig)]
    names = (*map(str.upper, ServiceConfig.model_fields), *engine, *_OF_CLIENTS)
    known = {f"HEADROOM_{name}" for name in names}
    unknown = sorted(
        name
        for name in map(str.upper, os.environ)
        if name.startswith("HEADROOM_") and name not in known
    )
    if unknown:
        raise SettingsError(f"environment variable {unknown[0]} is no setting")


def load_config(file: Path | None = None, **flags: Any) -> ServiceConfig:
    """Settings from flags (None is unset), environment, a YAML file and defaults.

    Raises:
        SettingsError: the file cannot be read, or a setting is unknown or not allowed.
    """
    if file is not None and not file.is_file():
        raise SettingsError(f"{file} is not a file")
    _check_environment()

    class FileConfig(ServiceConfig):
        model_config = SettingsConfigDict(yaml_file=file, yaml_file_encoding="utf-8")

    given = {name: value for name, value in flags.items() if value is not None}
    try:
        return FileConfig(**given)
    except ValidationError as error:
        lines = [
            f"{'.'.join(map(str, problem['loc']))} is {problem['input']!r}: {problem['msg']}"
            if problem["loc"]
            else problem["msg"]
            for problem in error.errors()
        ]
        raise SettingsError("\n".join(lines)) from error
    except Exception as error:  # the YAML reader's own kinds
        raise SettingsError(f"{file} cannot be read: {error}") from error
