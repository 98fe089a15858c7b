"""Builds mails as bytes, for the service that sends them and the one that shows them."""
