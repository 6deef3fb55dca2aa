"""Pictures the project draws of itself: architectures, loss and speed curves (matplotlib)."""
