"""The credential broker: the only process that reads long-lived secrets; signs hand tokens and records."""
