"""Fine-tuning on a small scale, and the statistics of its runs."""
