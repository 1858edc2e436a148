"""A very small web shop."""
