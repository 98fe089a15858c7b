"""The settings that must agree: stored once per installation, and the same in every process."""
