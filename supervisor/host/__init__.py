"""Children and engine instances. The only package that spawns processes and sends signals."""
