"""SMTP as dispatchers and VerifySender speak it: sessions, and what a reply means."""
