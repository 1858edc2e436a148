"""`execute(name, input) -> string`: the hand registry, the sandbox client and the built-in toolset."""
