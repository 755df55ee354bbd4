"""Makers of the fixture models, one small module each; run them with `scripts/make-fixtures`."""
