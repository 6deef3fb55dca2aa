"""Phonebook: one number asked for in a long list of them; what the paper found at it."""
