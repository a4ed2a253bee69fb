"""What a model holds inside: linear probes, perplexity; later token loss, margins and leakage."""
