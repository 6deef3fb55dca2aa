"""Does it retrieve, does it know, does it reason: suites of questions, and models that answer."""
