"""A scripted Messages API server: plays Claude's side in demos, tests and benchmarks. There is no model in it.

A project of its own that imports nothing of Cowhand, so that what it refuses is not what Cowhand happens to send.
Its answers come from scripts and built-in scenarios; it refuses what the real API refuses, and records every request.
"""
