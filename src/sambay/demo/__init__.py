"""`make demo`: from the sources of Python's standard library to two trained models and pictures."""
