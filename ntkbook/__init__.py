"""Linearised neural networks as Gaussian processes, in PyTorch and GPyTorch."""

import warnings
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ntkbook.distributed import DistributedLinearization
    from ntkbook.fisher import (
        automatic_epsilon,
        empirical_fisher_vector_product,
        fisher_vector_product,
        monte_carlo_fisher_vector_product,
    )
    from ntkbook.fisher_operator import FisherOperator
    from ntkbook.fisher_posterior import FisherPosterior
    from ntkbook.gp import NTKGP
    from ntkbook.iterative import ConvergenceWarning, Iterative, Report
    from ntkbook.kernel import NTKKernel
    from ntkbook.linearize import Linearization
    from ntkbook.nystrom import Nystrom
    from ntkbook.posterior import Posterior
    from ntkbook.similarity import (
        by_layer,
        cosine_by_layer,
        cosine_similarity,
        empirical_fisher_diagonal,
        fisher_diagonal,
        jacobian_diagonal,
    )
    from ntkbook.tasks import TaskHyperparameters

__all__ = [
    "NTKGP",
    "ConvergenceWarning",
    "DistributedLinearization",
    "FisherOperator",
    "FisherPosterior",
    "Iterative",
    "Linearization",
    "NTKKernel",
    "Nystrom",
    "Posterior",
    "Report",
    "TaskHyperparameters",
    "automatic_epsilon",
    "by_layer",
    "cosine_by_layer",
    "cosine_similarity",
    "empirical_fisher_diagonal",
    "empirical_fisher_vector_product",
    "fisher_diagonal",
    "fisher_vector_product",
    "jacobian_diagonal",
    "monte_carlo_fisher_vector_product",
]
__version__ = "0.1.0"

_HOMES = {
    "ConvergenceWarning": "iterative",
    "DistributedLinearization": "distributed",
    "FisherOperator": "fisher_operator",
    "FisherPosterior": "fisher_posterior",
    "Iterative": "iterative",
    "Linearization": "linearize",
    "NTKGP": "gp",
    "NTKKernel": "kernel",
    "Nystrom": "nystrom",
    "Posterior": "posterior",
    "Report": "iterative",
    "TaskHyperparameters": "tasks",
    "automatic_epsilon": "fisher",
    "by_layer": "similarity",
    "cosine_by_layer": "similarity",
    "cosine_similarity": "similarity",
    "empirical_fisher_diagonal": "similarity",
    "empirical_fisher_vector_product": "fisher",
    "fisher_diagonal": "similarity",
    "fisher_vector_product": "fisher",
    "jacobian_diagonal": "similarity",
    "monte_carlo_fisher_vector_product": "fisher",
}

# linear_operator compiles a function at import in a way that torch 2.15 warns about: nothing its users can mend.
warnings.filterwarnings("ignore", r"`torch\.jit\.script` is deprecated", FutureWarning)


def __getattr__(name: str) -> Any:
    # On first use, so that the command line, which needs no torch, answers at once.
    if name not in _HOMES:
        raise AttributeError(f"module 'ntkbook' has no attribute {name!r}: it has {', '.join(__all__)}")
    return getattr(import_module(f"ntkbook.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
