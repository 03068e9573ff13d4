"""Runs the Ray Serve runtime in a process of its own, told what to do by lines on its input.

    python -m tests.integration.ray_host '{"model": ..., "port": ...}'

Prints `ready`; each line of input is JSON of settings to redeploy with, answered by `deployed`;
the end of input drains and stops, answered by `stopped`.
"""

import json
import sys

from service.config import ServiceConfig
from service.runtimes.ray_environment import set_ray_environment


def main() -> None:
    settings = json.loads(sys.argv[1])
    config = ServiceConfig(**settings)
    set_ray_environment(config)
    from service.runtimes import ray_serve
    from service.runtimes.edge import Addresses

    try:
        ray_serve.start(config, Addresses(config.host, config.port, config.http_port))
        print("ready", flush=True)
        for line in sys.stdin:
            ray_serve.deploy(ServiceConfig(**{**settings, **json.loads(line)}))
            print("deployed", flush=True)
    finally:
        ray_serve.stop(config)
    print("stopped", flush=True)


if __name__ == "__main__":
    main()
