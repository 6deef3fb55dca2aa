"""The bridge to lm-eval: its tasks and metrics, with our backends as the model."""
