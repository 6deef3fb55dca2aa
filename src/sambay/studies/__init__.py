"""Studies that train many models: coordinate checks, learning-rate transfer, ladders."""
