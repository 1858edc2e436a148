"""Cowhand: managed agents on your own Kubernetes.

The brain (Claude and its harness), the hands (sandboxes and tools) and the session (an append-only
log) are separate processes that fail, scale and are replaced on their own. `docs/architecture.md`
has the map from concept to package.
"""

__version__ = "0.1.0"
