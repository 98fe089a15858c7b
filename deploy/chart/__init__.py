"""The Helm chart, and what is derived from it."""
