"""Sends what is due: claims, marks, sends by SMTP, settles; retries and recovers."""
