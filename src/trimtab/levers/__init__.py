"""The three ideas, each a pure function over rows and schedules: timing, prefix, modes."""
