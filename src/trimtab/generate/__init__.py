"""Generation: batched decoding with a seed for every prompt."""
