"""Who answers at the address of a Ray cluster; asked without Ray, which would wait for minutes."""

import socket
import ssl
from collections.abc import Mapping

_ANSWER_SECONDS = 5.0


def uses_tls(environment: Mapping[str, str]) -> bool:
    """Whether Ray's processes speak TLS to each other, as Ray itself reads its variable."""
    return environment.get("RAY_USE_TLS", "0").lower() in ("1", "true")


def speaks_tls(address: str) -> bool:
    """Whether a server is spoken to in TLS; whose it is, is not asked.

    Args:
        address: HOST:PORT.

    Raises:
        OSError, OverflowError: nobody answers.
    """
    host, _, port = address.rpartition(":")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    with socket.create_connection((host.strip("[]"), int(port)), _ANSWER_SECONDS) as plain:
        try:
            context.wrap_socket(plain).close()
        except (ssl.SSLError, ConnectionError):
            return False
    # In TLS 1.3 a server that asks for certificates refuses a client without one only afterwards.
    return True
