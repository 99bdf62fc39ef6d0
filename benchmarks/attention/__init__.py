"""Benchmarks of the attention kernels, and the gate that compiles them without a GPU.

cpu            the CPU backend beside dense SDPA
gpu            the Triton kernels beside the baselines, drawn by `draw`
correctness    the kernels against a float64 reference on a GPU
decode         the decoding cache on a GPU
tune           times tiles and rewrites the shipped table
compile_gate   registers, spills and instructions of every shipped kernel
pairs_model    counted pairs: touched over needed
"""
