"""Runs a program of the operator's, one process per job."""
