"""Logging of every process: JSON lines with the key-values of what is being worked on."""
