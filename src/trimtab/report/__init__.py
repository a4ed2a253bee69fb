"""Results -> one self-contained HTML file, with CSV and JSON of every figure in it."""
