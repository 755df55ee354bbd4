"""What jobs used, by tenant, key, worker, model and day."""
