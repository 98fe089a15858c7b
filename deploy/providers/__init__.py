"""Simulated mail providers: SMTP servers on loopback with declared limits."""
