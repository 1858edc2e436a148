"""What two processes exchange: hand tokens, signed records, keys, certificates.

Standard library and cryptography only.
"""
