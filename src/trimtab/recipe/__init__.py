"""The typed recipe: YAML plus overrides, and errors that name the field."""
