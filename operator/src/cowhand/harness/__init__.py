"""The brain's loop: claims sessions, builds requests from the log, streams Claude, runs tools, appends."""
