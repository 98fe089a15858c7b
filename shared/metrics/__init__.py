"""Prometheus metrics: those that all services have, and the endpoint that serves them."""
