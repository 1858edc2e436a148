"""Context profiles: what a session does before its conversation outgrows the model's context window.

A profile is one small module, built in or found by the entry point group `cowhand.context_profiles`; an Agent
names it (`spec.context.profile`) or takes the one that declares itself best for its model. Profiles
are pure and only decide; `harness.context` carries out what they decide, as events of the log.
"""
