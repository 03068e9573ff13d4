"""Talks to a server with nothing of ours but the generated code, and with grpcio's health client.

    python -m tests.integration.plain_stub HOST:PORT

Prints the greedy token ids of a fixed prompt.
"""

import sys

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from protos.headroom.v1 import generation_pb2, generation_pb2_grpc


def main(target: str) -> None:
    with grpc.insecure_channel(target) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        answer = health.Check(health_pb2.HealthCheckRequest(), timeout=30)
        assert answer.status == health_pb2.HealthCheckResponse.SERVING, answer
        watch = health.Watch(health_pb2.HealthCheckRequest(), timeout=30)
        assert next(watch).status == health_pb2.HealthCheckResponse.SERVING
        watch.cancel()
        stub = generation_pb2_grpc.GenerationServiceStub(channel)
        request = generation_pb2.GenerateRequest(
            token_ids=generation_pb2.TokenIds(ids=[1, 2, 3]),
            sampling=generation_pb2.SamplingParams(temperature=0, max_tokens=16, ignore_eos=True),
        )
        token_ids: list[int] = []
        for response in stub.Generate(request, timeout=30):
            token_ids.extend(response.delta.token_ids)
    print(" ".join(map(str, token_ids)))


if __name__ == "__main__":
    main(sys.argv[1])
