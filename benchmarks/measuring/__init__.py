"""What is measured and how: timing, the rivals, their shapes and models, and what a stored row holds."""
