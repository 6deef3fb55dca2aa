"""`make demo`: from the sources of Python's standard library to two trained models and pictures."""

import os

# As in sambay.cli.main; it must be set before torch is imported, which the demo does at once.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
