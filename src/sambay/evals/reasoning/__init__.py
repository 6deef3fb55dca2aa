"""Questions of reasoning benchmarks, and what many samples of one question say together."""
