"""The hold of an installation after a restore: its row, and the mail that may be sent meanwhile."""
