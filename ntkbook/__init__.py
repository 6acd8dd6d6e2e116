"""Linearised neural networks as Gaussian processes, in PyTorch and GPyTorch."""

from ntkbook.gp import NTKGP, Posterior
from ntkbook.kernel import NTKKernel
from ntkbook.linearize import Linearization

__all__ = ["NTKGP", "Linearization", "NTKKernel", "Posterior"]
