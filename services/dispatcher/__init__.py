"""Sends due mail: claims and marks jobs, sends them by SMTP, settles, retries and recovers."""
