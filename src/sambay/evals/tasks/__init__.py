"""What the suites ask: data of tasks, prompts with needles, windows over long texts."""
