"""The drill: a private stack under load, whose parts are killed at random, from a seed."""
