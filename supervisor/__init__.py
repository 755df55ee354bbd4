"""The supervisor: one small trio process that owns the coordinator link and every engine child."""
