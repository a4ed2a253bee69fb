"""From rows to batches: sources, token-safe rendering, packing, mixture and the token store (torch-free)."""
