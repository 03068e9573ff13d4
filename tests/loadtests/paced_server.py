"""A server whose times are known: every token comes by the clock, whatever the load.

python -m tests.loadtests.paced_server PORT MAX_OPEN
"""

import asyncio
import sys
from collections.abc import AsyncIterator
from typing import Any

import grpc

from protos.headroom.v1 import (
    generation_pb2,
    generation_pb2_grpc,
    models_pb2,
    models_pb2_grpc,
)
from service.engine.errors import QueueFullError
from service.errors import DETAILS_KEY, to_status

FIRST_TOKEN = 0.1
GAP = 0.05
VOCAB_SIZE = 50


class PacedServicer(
    generation_pb2_grpc.GenerationServiceServicer, models_pb2_grpc.ModelServiceServicer
):
    """Refuses what is more than `max_open` streams at once, as a full queue does."""

    def __init__(self, max_open: int) -> None:
        self._max_open = max_open
        self._num_open = 0

    async def GetModel(self, request: Any, context: Any) -> models_pb2.GetModelResponse:  # noqa: N802
        return models_pb2.GetModelResponse(name="paced", vocab_size=VOCAB_SIZE)

    async def Generate(  # noqa: N802
        self, request: generation_pb2.GenerateRequest, context: Any
    ) -> AsyncIterator[generation_pb2.GenerateResponse]:
        if self._num_open == self._max_open:
            code, status = to_status(QueueFullError(unit="requests", limit=self._max_open))
            context.set_trailing_metadata([(DETAILS_KEY, status.SerializeToString())])
            await context.abort(code, status.message)
        self._num_open += 1
        clock = asyncio.get_running_loop().time
        began = clock()
        try:
            for number in range(request.sampling.max_tokens):
                await asyncio.sleep(began + FIRST_TOKEN + number * GAP - clock())
                delta = generation_pb2.TokenDelta(token_ids=[request.token_ids.ids[0]])
                yield generation_pb2.GenerateResponse(delta=delta)
            finished = generation_pb2.Finished(reason=generation_pb2.FINISH_REASON_LENGTH)
            yield generation_pb2.GenerateResponse(finished=finished)
        finally:
            self._num_open -= 1


async def _serve(port: int, max_open: int) -> None:
    server = grpc.aio.server()
    servicer = PacedServicer(max_open)
    generation_pb2_grpc.add_GenerationServiceServicer_to_server(servicer, server)
    models_pb2_grpc.add_ModelServiceServicer_to_server(servicer, server)
    server.add_insecure_port(f"127.0.0.1:{port}")
    await server.start()
    print("ready", flush=True)
    await server.wait_for_termination()


if __name__ == "__main__":
    asyncio.run(_serve(int(sys.argv[1]), int(sys.argv[2])))
