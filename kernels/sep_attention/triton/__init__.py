"""Triton kernels of the forward and backward pass. Importing this package does not import Triton."""
