"""The Grafana dashboard, and the files by which Grafana loads it."""
