"""The custom resources as pydantic models, and the generator of their CRDs; no other logic, imported by everything."""
