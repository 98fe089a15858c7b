"""Builds a release: versions, distributions, SBOM, licences, checksums. Not installed."""
