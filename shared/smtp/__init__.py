"""The SMTP client of dispatchers and VerifySender: sessions, and the meaning of replies."""
