"""What is sent, and what is not, while an installation is held after a restore."""
