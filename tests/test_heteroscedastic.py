"""heteroscedastic.py against dense formulas and an optimiser of another kind."""

import math

import pytest
import torch
from torch import nn

from ntkbook import Linearization
from ntkbook.experiments.heteroscedastic import OwnNoiseNTK, converge_last, diverged, mean_network, predict
from ntkbook.experiments.networks import mlp

GENERATOR = torch.Generator().manual_seed(3)
X = torch.rand(12, 2, generator=GENERATOR, dtype=torch.float64)
Y = torch.sin(6 * X[:, 0]) + 0.1 * torch.randn(12, generator=GENERATOR, dtype=torch.float64)
STAR = torch.rand(7, 2, generator=GENERATOR, dtype=torch.float64)


def net(seed=0):
    return mlp([2, 9, 8, 2], seed=seed, dtype=torch.float64)


def variance(outputs):
    return 1e-5 + nn.functional.softplus(outputs[:, 1])


def test_the_mean_network_is_the_first_output_with_its_kernel():
    both, mean = net(), mean_network(net())
    torch.testing.assert_close(mean(X), both(X)[:, :1], rtol=0, atol=1e-15)
    whole = Linearization(both).gram(X, STAR, output=0)
    torch.testing.assert_close(Linearization(mean).gram(X, STAR), whole, rtol=1e-13, atol=0)
    mean[-1].weight.data.zero_()
    assert both[-1].weight.abs().min() > 0  # a copy


def test_a_network_says_its_own_mean_and_variance():
    nets = [net(0), net(1)]
    got = predict(nets, X)
    for t, one in enumerate(nets):
        f = one(X)
        torch.testing.assert_close(got.mean[t], f[:, 0], rtol=0, atol=0)
        torch.testing.assert_close(got.variance[t], variance(f), rtol=1e-14, atol=0)


@pytest.mark.parametrize("prior", ["zero", "network"])
def test_the_kernel_with_the_networks_own_noise_is_the_dense_formula(prior):
    one = net()
    rows = torch.cat([X, STAR])
    jacobian = torch.stack(
        [torch.cat([g.flatten() for g in torch.autograd.grad(one(row[None])[0, 0], one.parameters())]) for row in rows]
    )
    j, j_star = jacobian[:12], jacobian[12:]
    inverse = torch.linalg.inv(j @ j.T + variance(one(X)).diag())
    start, start_star = (one(X)[:, 0], one(STAR)[:, 0]) if prior == "network" else (0.0, 0.0)
    mean = start_star + j_star @ j.T @ inverse @ (Y - start)
    latent = (j_star @ (torch.eye(j.shape[1]) - j.T @ inverse @ j) @ j_star.T).diagonal()
    got = OwnNoiseNTK(one, mean=prior).predict(X, Y[None], STAR, chunk_size=3)
    torch.testing.assert_close(got.mean[0], mean, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(got.variance[0], latent + variance(one(STAR)), rtol=1e-10, atol=1e-12)


def test_divergence_is_a_loss_that_ends_no_lower_than_it_began():
    loss = torch.tensor(
        [
            [1.0, 9.0, 0.9],
            [1.0, 0.1, 1.0],
            [1.0, 0.5, math.nan],
            [1.0, 2.0, math.inf],
            [math.nan, 1, 1],
            [1.0, 1.0, -math.inf],
        ]
    )
    assert diverged(loss).tolist() == [False, True, True, True, True, True]
    assert not diverged(loss[0])


def nll(last, phi, y):
    f = last(phi)
    return -torch.distributions.Normal(f[:, 0], variance(f).sqrt()).log_prob(y).mean()


def test_a_converged_last_layer_is_where_newton_ends():
    one = mlp([2, 3, 2], seed=4, dtype=torch.float64)
    before = [p.clone() for p in one.parameters()]
    got, success = converge_last(one, X, Y)
    assert success
    phi = one[:2](X).detach()
    torch.testing.assert_close(got[:2](X), phi, rtol=0, atol=0)

    def loss(theta):
        return nll(lambda a: a @ theta[:6].view(2, 3).T + theta[6:], phi, Y)

    theta = torch.cat([got[-1].weight.flatten(), got[-1].bias]).detach()
    for _ in range(20):
        theta = theta - torch.linalg.solve(torch.func.hessian(loss)(theta), torch.func.grad(loss)(theta))
    assert torch.linalg.eigvalsh(torch.func.hessian(loss)(theta)).min() > 0
    assert torch.func.grad(loss)(theta).abs().max() < 1e-9
    assert nll(got[-1], phi, Y).item() == pytest.approx(loss(theta).item(), abs=1e-10)
    assert nll(got[-1], phi, Y).item() < nll(one[-1], phi, Y).item() - 0.01
    assert all(torch.equal(a, b) for a, b in zip(before, one.parameters()))


def test_features_that_depend_on_each_other_are_no_hindrance():
    one = mlp([2, 4, 2], seed=4, dtype=torch.float64)
    with torch.no_grad():  # units 3 and 2 the same, and a unit that is as constant as the bias
        one[0].weight[3], one[0].bias[3] = one[0].weight[2], one[0].bias[2]
        one[0].weight[1], one[0].bias[1] = 0, 1
    got, success = converge_last(one, X, Y)
    assert success
    features = one[:2](X).detach()[:, [0, 2]]
    small = nn.Sequential(nn.Identity(), nn.Linear(2, 2, dtype=torch.float64))
    least, success = converge_last(small, features, Y)
    assert success
    assert nll(got[-1], one[:2](X), Y).item() == pytest.approx(nll(least[-1], features, Y).item(), abs=1e-10)


def test_a_last_layer_stopped_early_says_so():
    _, success = converge_last(net(), X, Y, max_iter=2)
    assert not success
