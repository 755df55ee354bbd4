"""Reaches a server of the operator's: its own child, or one that already runs."""
