"""One training loop for pretraining and SFT, with its settings, schedule, state and log."""
