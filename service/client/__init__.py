"""A typed Python client, blocking and asyncio.

from service.client import Client

with Client("127.0.0.1:9000") as client:
    for text in client.generate("def main(", max_tokens=64, temperature=0):
        print(text, end="")
"""

from protos.headroom.v1.attention_pb2 import Alibi as Alibi
from protos.headroom.v1.attention_pb2 import Rope as Rope
from service.client.aio import AsyncClient as AsyncClient
from service.client.attention import Attended as Attended
from service.client.attention import AttentionVariant as AttentionVariant
from service.client.calls import DEFAULT_APPLICATION as DEFAULT_APPLICATION
from service.client.errors import HeadroomError as HeadroomError
from service.client.errors import ReplicaLostError as ReplicaLostError
from service.client.errors import to_error as to_error
from service.client.requests import Prompt as Prompt
from service.client.requests import RequestOptions as RequestOptions
from service.client.requests import Sampling as Sampling
from service.client.streams import AsyncTextStream as AsyncTextStream
from service.client.streams import TextStream as TextStream
from service.client.sync import Client as Client
