"""Deployments: which model is to be served by how many workers, and what is done about it."""
