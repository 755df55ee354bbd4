"""The dashboard at `/`: its page, its sessions, and the one feed that keeps it true."""
