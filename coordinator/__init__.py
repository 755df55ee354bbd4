"""The coordinator: holds the queue, talks to workers and to clients. Depends on `protocol` only."""
