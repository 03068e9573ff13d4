"""Two hosts for the same servicer: Ray Serve (default) and a plain grpc.aio server."""
