"""What two processes exchange: hand tokens, signed records, message shapes. Standard library and cryptography only."""
