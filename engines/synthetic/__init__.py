"""Every task kind from arithmetic alone, deterministic; for tests and first steps, never for real answers."""
