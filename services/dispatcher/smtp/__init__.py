"""Sends mails to SMTP servers over kept connections."""

from outbox_server.services.dispatcher.smtp.pool import EndpointState, SmtpPool
from outbox_server.services.dispatcher.smtp.result import Envelope, GivenBackError, SendResult

__all__ = ["EndpointState", "Envelope", "GivenBackError", "SendResult", "SmtpPool"]
