"""Using few experts: choose them for a task, check what is lost, extract or load them, compose, train, put back."""
