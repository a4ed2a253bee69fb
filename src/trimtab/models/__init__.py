"""Models: build small ones, load any, keep bundles."""
