"""OpenTelemetry traces, from the span of a caller to the replies of mail servers."""
