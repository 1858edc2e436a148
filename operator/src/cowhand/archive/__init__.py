"""The archive: large payloads and old events of every session, in a volume or an object store."""
