"""sandboxd: runs commands and file tools inside a Cowhand sandbox.

A project of its own that imports nothing but the standard library, so that any image with Python 3.11 and bash
can carry it. The proxy of the sandbox pod is its only client; docs/interfaces.md section 5 is the wire protocol.
"""

WIRE_VERSION = 1
