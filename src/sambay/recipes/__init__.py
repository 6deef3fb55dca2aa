"""Recipes: functions that return a complete `RunConfig` and state only what sets it apart."""
