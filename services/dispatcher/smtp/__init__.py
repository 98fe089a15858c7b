"""Sends mails to SMTP servers over kept connections."""

from services.dispatcher.smtp.pool import EndpointState, SmtpPool
from services.dispatcher.smtp.result import Envelope, GivenBackError, SendResult

__all__ = ["EndpointState", "Envelope", "GivenBackError", "SendResult", "SmtpPool"]
