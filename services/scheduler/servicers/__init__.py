"""The gRPC services of the scheduler, one module per service."""
