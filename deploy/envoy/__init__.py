"""Envoy in front of the services: REST (JSON), gRPC-Web and gRPC on one port."""
