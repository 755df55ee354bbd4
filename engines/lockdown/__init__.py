"""What the launcher locks an engine child down with. Standard library only: it runs under `python -I -S`."""
