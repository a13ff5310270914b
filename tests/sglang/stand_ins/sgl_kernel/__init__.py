"""Stands in for SGLang's CUDA kernels, see README.md."""
