"""Triton kernels and their launchers. They know neither autograd nor modules; `configs` holds every tile."""
