import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import beta, kstest

from recap_model.policy import flow


def test_interpolate_ends_at_noise_and_at_data():
    actions, noise = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    at_noise, velocity = flow.interpolate(actions, noise, torch.ones(2))
    at_data, _ = flow.interpolate(actions, noise, torch.zeros(2))
    assert torch.equal(at_noise, noise) and torch.equal(at_data, actions)
    assert torch.equal(velocity, noise - actions)


@given(st.integers(1, 20))
def test_euler_is_exact_on_the_true_velocity(steps):
    actions, noise = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    x = flow.integrate(lambda *_: noise - actions, noise, steps)
    torch.testing.assert_close(x, actions, atol=1e-5, rtol=1e-5)


def test_loss_ignores_actions_past_the_end():
    velocity, target = torch.randn(2, 5, 3), torch.randn(2, 5, 3)
    valid = torch.tensor([[True] * 5, [True, True, False, False, False]])
    changed = velocity.clone()
    changed[1, 2:] += 100
    assert torch.equal(flow.loss(velocity, target, valid), flow.loss(changed, target, valid))
    rows = torch.cat([(velocity - target)[0], (velocity - target)[1, :2]])
    torch.testing.assert_close(flow.loss(velocity, target, valid), (rows**2).mean())


def test_time_is_beta_distributed():
    time = flow.sample_time(20_000, torch.Generator().manual_seed(0)).numpy()
    assert time.min() >= 0.001 and time.max() <= 1.0
    assert kstest((time - 0.001) / 0.999, beta(flow.BETA_A, flow.BETA_B).cdf).pvalue > 0.01


def test_times_are_lerobots():
    assert flow.times(10) == tuple(1.0 + step * (-1.0 / 10) for step in range(10))
