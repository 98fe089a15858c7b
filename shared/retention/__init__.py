"""Removes finished jobs, their attempts and their batches when they are older than retention."""
