"""What a step does: one file per room, one function per kind of step."""
