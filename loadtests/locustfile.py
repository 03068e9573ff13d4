"""The load as locust runs it: alone, with its web page, or over several machines.

    locust -f loadtests/locustfile.py --host 127.0.0.1:9000 --users 32 --spawn-rate 32

Prints a JSON line about every second, and the summary of each load as the last one.
"""

import sys
from typing import Any

import grpc.experimental.gevent
from locust import events
from locust.env import Environment

from loadtests.options import add_options
from loadtests.session import Session
from loadtests.users import GenerationUser

__all__ = ["GenerationUser"]  # locust finds its users here


def _begin(environment: Environment, **_: Any) -> None:
    # After the fork of --processes, before any channel.
    grpc.experimental.gevent.init_gevent()
    try:
        Session(environment)
    except ValueError as error:
        for line in str(error).splitlines():
            print(f"error: {line}", file=sys.stderr)
        sys.exit(2)


events.init_command_line_parser.add_listener(add_options)
events.init.add_listener(_begin)
