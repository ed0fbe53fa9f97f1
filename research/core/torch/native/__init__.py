"""The CPU kernels of research/core/native as torch operators."""
