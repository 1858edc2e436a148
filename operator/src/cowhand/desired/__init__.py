"""Pure builders: from a spec and our configuration to the manifests of child objects."""
