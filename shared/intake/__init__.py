"""Reads and checks what a batch brings: its options, and its rows from a CSV or from a message.

The scheduler accepts batches with it, and the command line checks files before it uploads them.
"""
