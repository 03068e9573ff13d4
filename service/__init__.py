"""The engine (no transport) and its edge (gRPC, Ray Serve, command line)."""
