"""gRPC servers and clients: TLS, health, reflection, errors, paging, and limits on calls."""
