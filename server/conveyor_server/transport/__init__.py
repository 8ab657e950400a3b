"""What drives the core: an event loop and a gRPC server on it."""
