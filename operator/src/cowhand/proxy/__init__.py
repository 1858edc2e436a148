"""The credential proxy: sidecar of harness and sandbox pods. Imports only the standard library, h11 and wire."""
