"""Pure decisions: from a snapshot and the time to a plan, conditions and status."""
