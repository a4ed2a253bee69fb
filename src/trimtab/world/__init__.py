"""Tidewater, the sandbox world: a fictional harbour town with fictional hazards and exact judges (docs/tidewater.md)."""
