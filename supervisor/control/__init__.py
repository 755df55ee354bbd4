"""The owner speaks with a running supervisor."""
