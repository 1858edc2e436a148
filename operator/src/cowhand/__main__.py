"""`python -m cowhand`: the entry point of the container image."""

from cowhand.cli.main import main

if __name__ == "__main__":
    raise SystemExit(main())
