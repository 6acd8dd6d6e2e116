"""Linearised neural networks as Gaussian processes, in PyTorch and GPyTorch."""
