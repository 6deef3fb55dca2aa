"""How the published runs follow from their depth: tokens, learning rates."""
