"""Access tokens of OAuth 2.0 (RFC 6749) for SMTP AUTH: requested once, shared by all processes."""
