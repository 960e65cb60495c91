"""Tensor parallelism against one process."""
