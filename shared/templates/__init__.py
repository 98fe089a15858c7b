"""Liquid templates of a batch: parsed once, rendered for each mail, within limits."""
