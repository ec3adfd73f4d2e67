# SPDX-License-Identifier: Apache-2.0
"""The closed form against a generic least-squares solver, and its limits."""

import pytest
import torch

from heapr_vllm.errors import HeaprError
from heapr_vllm.prune.repair.least_squares import MIN_RIDGE, compensate, compensation, output_error
from heapr_vllm.prune.repair.second_moments import SecondMoment

HIDDEN, WIDTH = 12, 20
KEEP = torch.arange(WIDTH) % 5 < 3


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def random_moment(tokens: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor, SecondMoment]:
    """Correlated activations times router weights [tokens, I], a down_proj [H, I], and the second moment."""
    mixing = torch.randn(WIDTH, WIDTH, generator=generator, dtype=torch.float64)
    h = torch.randn(tokens, WIDTH, generator=generator, dtype=torch.float64) @ mixing
    ph = h * torch.rand(tokens, 1, generator=generator, dtype=torch.float64)
    weight = torch.randn(HIDDEN, WIDTH, generator=generator, dtype=torch.float64)
    return ph, weight, SecondMoment(tokens, ph.T @ ph)


@pytest.mark.parametrize(("tokens", "prior"), [(400, 3.0), (400, 0.0), (15, 3.0), (1, 0.5)])
def test_is_the_ridge_regression_of_the_docstring(tokens: int, prior: float, generator: torch.Generator) -> None:
    ph, weight, moment = random_moment(tokens, generator)
    kept = int(KEEP.sum())
    ridge = max(prior * kept / tokens, MIN_RIDGE) * moment.sums.diagonal()[KEEP].mean()
    rows = torch.cat([ph[:, KEEP], ridge.sqrt() * torch.eye(kept, dtype=torch.float64)])
    wanted = torch.cat([ph @ weight.T, ridge.sqrt() * weight[:, KEEP].T])
    solution = torch.linalg.lstsq(rows, wanted).solution.T
    refitted = compensate(weight, KEEP, compensation(moment, KEEP, prior))
    torch.testing.assert_close(refitted[:, KEEP], solution, rtol=1e-6, atol=1e-8)
    assert torch.equal(refitted[:, ~KEEP], weight[:, ~KEEP])


def test_many_tokens_reach_the_least_squares_optimum(generator: torch.Generator) -> None:
    ph, weight, moment = random_moment(100, generator)
    optimum = torch.linalg.lstsq(ph[:, KEEP], ph @ weight.T).solution.T
    distances = [
        float(
            (
                compensate(weight, KEEP, compensation(SecondMoment(100 * n, moment.sums * n), KEEP))[:, KEEP] - optimum
            ).norm()
            / optimum.norm()
        )
        for n in (1, 100, 10_000)
    ]
    assert distances[0] > distances[1] > distances[2] and distances[2] < 1e-3


def test_few_tokens_shrink_towards_the_original_weights(generator: torch.Generator) -> None:
    _, _, moment = random_moment(4096, generator)
    norms = [
        float(compensation(SecondMoment(tokens, moment.sums * tokens / 4096), KEEP).norm())
        for tokens in (1, 16, 256, 4096)
    ]
    assert norms == sorted(norms) and norms[0] < 0.3 * norms[-1]
    nothing = compensation(SecondMoment(0, torch.zeros(WIDTH, WIDTH, dtype=torch.float64)), KEEP)
    assert nothing.shape == (WIDTH - int(KEEP.sum()), int(KEEP.sum())) and not nothing.any()


def test_linear_combinations_of_kept_neurons_are_restored(generator: torch.Generator) -> None:
    ph, weight, _ = random_moment(4000, generator)
    ph[:, ~KEEP] = ph[:, KEEP] @ torch.randn(
        int(KEEP.sum()), WIDTH - int(KEEP.sum()), generator=generator, dtype=torch.float64
    )
    moment = SecondMoment(len(ph), ph.T @ ph)
    refitted = compensate(weight, KEEP, compensation(moment, KEEP, prior=0.0))
    error = ph[:, KEEP] @ refitted[:, KEEP].T - ph @ weight.T
    assert error.norm() < 1e-4 * (ph @ weight.T).norm()
    before = output_error(weight, moment, KEEP, weight[:, KEEP])
    assert output_error(weight, moment, KEEP, refitted[:, KEEP]) < 1e-7 * before


def test_reported_errors_are_those_of_the_tokens(generator: torch.Generator) -> None:
    ph, weight, moment = random_moment(300, generator)
    refitted = compensate(weight, KEEP, compensation(moment, KEEP))
    before = output_error(weight, moment, KEEP, weight[:, KEEP])
    after = output_error(weight, moment, KEEP, refitted[:, KEEP])
    assert before == pytest.approx(float((ph[:, ~KEEP] @ weight[:, ~KEEP].T).square().sum()))
    assert after == pytest.approx(float((ph @ weight.T - ph[:, KEEP] @ refitted[:, KEEP].T).square().sum()))
    assert after < before


def test_silent_neurons_and_broken_activations() -> None:
    silent = torch.zeros(WIDTH, WIDTH, dtype=torch.float64)
    assert not compensation(SecondMoment(50, silent), KEEP).any()
    with pytest.raises(HeaprError, match="not finite; calibrate again with --dtype float32"):
        compensation(SecondMoment(50, silent + torch.nan), KEEP)
