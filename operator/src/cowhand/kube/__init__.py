"""The only importer of the Kubernetes client: kinds, the protocol `Kube`, errors."""
