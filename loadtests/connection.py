"""How load clients reach a server: whom they trust, and what each of their calls carries."""

import os

import grpc

from loadtests.load import LoadSpec

# Several connections, because a proxy or server allows only so many streams on one.
USERS_PER_CHANNEL = 32
_OPTIONS = (("grpc.use_local_subchannel_pool", 1),)


def metadata(spec: LoadSpec) -> tuple[tuple[str, str], ...]:
    """Of every call: the application, and the bearer token of a file or of HEADROOM_TOKEN.

    Raises:
        OSError: the file cannot be read.
    """
    token = os.environ.get("HEADROOM_TOKEN")
    if spec.token_file is not None:
        token = spec.token_file.read_text(encoding="utf-8").strip()
    application = (("application", spec.application),)
    return application if token is None else (*application, ("authorization", f"Bearer {token}"))


def open_channel(spec: LoadSpec) -> grpc.Channel:
    """A connection of its own, for a thread's calls.

    Raises:
        OSError: the file of certificates cannot be read.
    """
    credentials = _credentials(spec)
    if credentials is None:
        return grpc.insecure_channel(spec.target, options=_OPTIONS)
    return grpc.secure_channel(spec.target, credentials, options=_OPTIONS)


def open_async_channel(spec: LoadSpec) -> grpc.aio.Channel:
    """The same for an event loop."""
    credentials = _credentials(spec)
    if credentials is None:
        return grpc.aio.insecure_channel(spec.target, options=_OPTIONS)
    return grpc.aio.secure_channel(spec.target, credentials, options=_OPTIONS)


def _credentials(spec: LoadSpec) -> grpc.ChannelCredentials | None:
    if spec.tls_ca is None:
        return None
    key, certificate = (
        None if path is None else path.read_bytes()
        for path in (spec.tls_client_key, spec.tls_client_cert)
    )
    return grpc.ssl_channel_credentials(spec.tls_ca.read_bytes(), key, certificate)
