"""The command line: starts the processes, and is the client that people use."""
