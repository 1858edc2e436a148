"""The session log: events, interfaces and the implementation on Redis Streams (the only importer of `redis`)."""
