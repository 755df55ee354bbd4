"""What the supervisor lets others see of itself: log, metrics, traces. Nothing in here decides anything."""
