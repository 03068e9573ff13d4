"""What the blocking and the asyncio client share."""

from typing import Any

from grpc_health.v1 import health_pb2, health_pb2_grpc

from protos.headroom.v1 import attention_pb2_grpc, generation_pb2_grpc, models_pb2_grpc

DEFAULT_APPLICATION = "headroom"
_MAX_MESSAGE_BYTES = 64 * 1024 * 1024


class Calls:
    """Stubs and metadata."""

    def __init__(self, channel: Any, application: str, token: str | None) -> None:
        self._channel = channel
        self._generation = generation_pb2_grpc.GenerationServiceStub(channel)
        self._attention = attention_pb2_grpc.AttentionServiceStub(channel)
        self._models = models_pb2_grpc.ModelServiceStub(channel)
        self._health = health_pb2_grpc.HealthStub(channel)
        # Ray Serve routes by this key; a server with several applications needs it.
        self._metadata = [("application", application)]
        if token is not None:
            self._metadata.append(("authorization", f"Bearer {token}"))


def channel_options() -> list[tuple[str, int]]:
    return [
        ("grpc.max_receive_message_length", _MAX_MESSAGE_BYTES),
        ("grpc.max_send_message_length", _MAX_MESSAGE_BYTES),
    ]


def is_serving(response: health_pb2.HealthCheckResponse) -> bool:
    return response.status == health_pb2.HealthCheckResponse.SERVING  # type: ignore[no-any-return]
