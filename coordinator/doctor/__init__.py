"""What keeps a coordinator, its store and its machine from working."""
