"""The verbs of `python -m mshnet`, a module each."""
