"""Panels, judges, metrics and their statistics. Torch-free."""
