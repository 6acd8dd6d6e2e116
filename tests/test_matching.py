"""matching.py: orders are symmetries of the network, and matching undoes them."""

import pytest
import torch
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from ntkbook import cosine_similarity, jacobian_diagonal
from ntkbook.experiments import matching
from ntkbook.experiments.networks import lenet3

GENERATOR = torch.Generator().manual_seed(0)
X = torch.rand(5, 784, generator=GENERATOR, dtype=torch.float64)


def vector(net):
    return parameters_to_vector(net.parameters()).detach()


@pytest.mark.parametrize("outputs", [1, 7])
def test_a_reordered_network_is_the_same_function_with_the_reordered_diagonal(outputs):
    net = lenet3(outputs, seed=3, dtype=torch.float64)
    other = lenet3(outputs, seed=4, dtype=torch.float64)
    order = matching.shuffled(vector(net), GENERATOR)
    moved = matching.reorder(vector(net), order)
    assert not torch.equal(moved, vector(net))
    vector_to_parameters(moved, other.parameters())
    torch.testing.assert_close(other(X), net(X)[:, order.classes], rtol=0, atol=1e-14)
    diagonal = matching.reorder(jacobian_diagonal(net, X), order)
    torch.testing.assert_close(jacobian_diagonal(other, X), diagonal, rtol=1e-12, atol=0)


def test_the_identity_changes_nothing():
    v = torch.randn(5142, generator=GENERATOR)
    assert torch.equal(matching.reorder(v, matching.identity(v)), v)


def test_matching_undoes_a_random_order_and_never_loses():
    v = torch.rand(5142, generator=GENERATOR, dtype=torch.float64).square()
    order = matching.identity(v)._asdict()
    for name in order:  # one of the three at a time: a single assignment finds it exactly
        one = matching.Order(**(order | {name: order[name].flip(0)}))
        assert torch.equal(matching.match(v, matching.reorder(v, one)), v)
    moved = matching.reorder(v, matching.shuffled(v, GENERATOR))
    starts = [matching.shuffled(v, GENERATOR) for _ in range(5)]
    found = matching.match(v, moved, starts)
    assert sorted(found.tolist()) == sorted(v.tolist())
    assert cosine_similarity(v, found) > cosine_similarity(v, moved)
    assert cosine_similarity(v, found) >= cosine_similarity(v, matching.match(v, moved))


def test_another_vector_is_refused():
    with pytest.raises(ValueError, match="lenet3's parameters, got"):
        matching.reorder(torch.zeros(100), matching.identity(torch.zeros(5142)))
