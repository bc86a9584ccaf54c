"""OPO, sections 7, 8, 10, A.1 and A.2: surrogate, descent, saturation, trust region."""

from __future__ import annotations

import math

import torch

from proxstep import algorithms as losses
from tests.theory.cases import Case, close, counted, gradient, hessian, random, softmax_log_ratio
from tests.theory.maths import categorical, descent, escort, fisher, opo, surrogate
from tests.theory.maths import trust_region as region
from tests.theory.opo_geometry import KL, SWAPPED_ESCORT
from tests.theory.opo_response import DISSIPATION, OBJECTIVE, UNCENTERED
from tests.theory.registry import CORRECTED, FALSE, states

LOG_LOSS = ("maths.surrogate.log_loss", "penalty - inner", "penalty + inner")
LOG_PENALTY = ("maths.surrogate.log_loss", "mu / 2 * inner", "mu * inner")
STEP = ("maths.descent.path", "- step_size * gradient", "- 0.5 * step_size * gradient")
GRADIENT = ("maths.opo.gradient", "mu * deviation_V - drive_V", "mu * deviation_V")
RADIUS = ("maths.trust_region.multiplier", "/ radius).sqrt()", "/ radius)")
TOO_FAR = ("maths.trust_region.optimum", "drive_V / mu", "2 * drive_V / mu")
OPTIMUM = ("maths.surrogate.optimum", "> middle.exp()", "> 2 * middle.exp()")
NEWTON = ("maths.surrogate._wright_omega", "(log_w + w - value_V)", "(log_w - value_V)")


@states(
    "OPO",
    "eq. 19",
    "With Delta in place of v the objective is -E[omega Delta] + mu / 2 E[Delta^2].",
    LOG_LOSS,
    LOG_PENALTY,
    KL,
    OPTIMUM,
    NEWTON,
    holds=CORRECTED,
    remark="E[v] = 0 but E[Delta] = -KL(pi_k, pi): the drive omega, as printed, adds KL(pi_k, pi), "
    "that is 1 to the curvature, and the optimum is (omega - 1) / (mu + 1) to first order. The "
    "drive omega - 1 gives theorem 4.3's (omega - 1) / mu, to first order too, and is proxstep's "
    "default.",
)
def log_surrogate(seed: int) -> None:
    case = Case(seed)
    anchor_V, mu = case.anchor_V, case.mu
    delta_V = (case.policy_V / anchor_V).log()
    printed = surrogate.log_loss(delta_V, case.weight_V, anchor_V, mu)
    centered = surrogate.log_loss(delta_V, case.weight_V - 1, anchor_V, mu)
    close(printed - centered, categorical.kl(anchor_V, case.policy_V))
    weak, force_V = 1e-4, case.mean_zero()
    for drive_V, curvature in ((1 + weak * force_V, mu + 1), (weak * force_V, mu)):
        optimum_V = surrogate.optimum(drive_V, anchor_V, mu)
        close(optimum_V.exp() @ anchor_V, 1.0)
        close(optimum_V.expm1() * curvature / weak, force_V, rtol=1e-2, atol=1e-2)
        least = surrogate.log_loss(optimum_V, drive_V, anchor_V, mu)
        assert least < surrogate.log_loss(delta_V, drive_V, anchor_V, mu)
    _same_as_the_library(case)


def _same_as_the_library(case: Case) -> None:
    anchor_V, index_B = counted(case.seed)
    delta_V, drive_V = case.function(1), case.function(2)
    loss, _ = losses.opo(
        (anchor_V.log() + delta_V)[index_B, None],
        anchor_V.log()[index_B, None],
        drive_V[index_B],
        torch.ones(len(index_B), 1, dtype=torch.bool),
        mu=case.mu,
    )
    close(loss, surrogate.log_loss(delta_V, drive_V, anchor_V, case.mu))


@states(
    "OPO",
    "algorithm 1",
    "Descend eq. 19 with the drive e^((1 - alpha) A) pi_k^-(1 - alpha).",
    LOG_LOSS,
    ("maths.fisher.policy_gradient", "prob_V * advantage_V", "advantage_V"),
    holds=CORRECTED,
    remark="Line 5 leaves out the normalization of eq. 6 (section 4.1 z-scores instead), so that "
    "the drive's scale competes with mu, and the centering of eq. 18. At the anchor centering does "
    "not change the expected gradient (scores have mean 0), only its variance; on a sample every "
    "weight is positive, and nothing is pushed down.",
)
def algorithm(seed: int) -> None:
    case = Case(seed)
    anchor_V, log_ratio = case.anchor_V, softmax_log_ratio(case)
    printed_V = ((case.advantage_V - anchor_V.log()) * (1 - case.alpha)).exp()
    normalizer = (anchor_V * printed_V).sum()
    close(printed_V / normalizer, case.weight_V)
    assert abs(normalizer - 1) > 1e-2
    origin_V = torch.zeros_like(anchor_V)

    def slope(drive_V: torch.Tensor) -> torch.Tensor:
        return gradient(
            lambda z: surrogate.log_loss(log_ratio(z), drive_V, anchor_V, case.mu), origin_V
        )

    score_VP = fisher.scores(log_ratio, origin_V)
    ascent_P = fisher.policy_gradient(score_VP, anchor_V, case.weight_V - 1)
    close(slope(case.weight_V - 1), -ascent_P)
    close(slope(printed_V), -normalizer * ascent_P)
    assert (printed_V > 0).all()


@states(
    "OPO",
    "section 8.2, eq. 20",
    "Gradient descent with -omega + mu v shrinks v - v* by 1 - eta mu in every step.",
    STEP,
    GRADIENT,
    UNCENTERED,
    holds=CORRECTED,
    remark="With the printed gradient v - v* is also moved by eta in every step: the iterates "
    "leave the functions of mean 0 and approach omega / mu. It holds with the drive omega - 1, the "
    "gradient within them.",
)
def descent_step(seed: int) -> None:
    case = Case(seed)
    mu, eta, start_V = case.mu, 0.7 / case.mu, case.mean_zero()
    optimum_V = opo.closed_form(case.weight_V, case.anchor_V, mu)
    _, right_V = descent.path(start_V, case.drive_V, mu, eta, 1)
    close(right_V - optimum_V, (1 - eta * mu) * (start_V - optimum_V))
    _, printed_V = descent.path(start_V, case.weight_V, mu, eta, 1)
    close(printed_V - optimum_V, (1 - eta * mu) * (start_V - optimum_V) + eta)
    limit_V = descent.path(start_V, case.weight_V, mu, eta, 60)[-1]
    close(limit_V, case.weight_V / mu)


@states(
    "OPO",
    "corollary 8.2",
    "For 0 < eta < 2 / mu the distance falls like |1 - eta mu|^m, whatever alpha.",
    STEP,
    GRADIENT,
    ("maths.descent.contraction", "1 - step_size * mu", "1 - step_size"),
    holds=CORRECTED,
    remark="For the drive omega - 1 (see eq. 20), with equality. With omega the distance to v* "
    "approaches 1 / mu.",
)
def linear_rate(seed: int) -> None:
    case = Case(seed)
    start_V, mu = case.mean_zero(), case.mu
    for alpha in (0.1, 0.9):
        weight_V = escort.escort_weight(case.anchor_V, case.target_V, alpha)
        optimum_V = (weight_V - 1) / mu
        for part in (0.2, 1.0, 1.9, 2.1):
            iterate_NV = descent.path(start_V, weight_V - 1, mu, part / mu, 12)
            distance_N = torch.stack([case.norm(v - optimum_V) for v in iterate_NV])
            rate = descent.contraction(mu, part / mu)
            powers_N = torch.tensor([rate**m for m in range(13)], dtype=torch.float64)
            close(distance_N, distance_N[0] * powers_N)
            assert (rate < 1) == (part < 2)
        printed_V = descent.path(start_V, weight_V, mu, 1 / mu, 12)[-1]
        close(case.norm(printed_V - optimum_V), 1 / mu)


@states(
    "OPO",
    "section 8.3",
    "Logistic curvature vanishes like sigma (1 - sigma); OPO's gradient is as long as mu times the "
    "distance to the optimum.",
    GRADIENT,
    UNCENTERED,
    holds=CORRECTED,
    remark="True of the gradient within the functions of mean 0. The printed -omega + mu v has "
    "squared length mu^2 |v - v*|^2 + 1.",
)
def restoring_force(seed: int) -> None:
    case = Case(seed)
    v, mu = case.mean_zero(), case.mu
    distance = case.norm(v - opo.closed_form(case.weight_V, case.anchor_V, mu))
    close(case.norm(opo.gradient(v, case.drive_V, mu)), mu * distance)
    close(case.norm(opo.gradient(v, case.weight_V, mu)) ** 2, (mu * distance) ** 2 + 1)
    for margin in (20.0, -20.0):
        at = torch.tensor([margin], dtype=torch.float64)
        curvature = hessian(lambda m: -torch.nn.functional.logsigmoid(m).sum(), at)
        close(curvature * math.exp(20), torch.ones(1, 1), rtol=1e-6)


@states(
    "OPO",
    "figure 3",
    "On a binary logit z with z_ref = 0, OPO's gradient with respect to z grows linearly and does "
    "not saturate.",
    LOG_PENALTY,
    LOG_LOSS,
    DISSIPATION,
    OBJECTIVE,
    holds=CORRECTED,
    remark="True of eq. 19 averaged over both outcomes: its slope in z tends to mu / 2 times z. "
    "The exact objective of eq. 10 saturates in z, as p (1 - p), and so does eq. 19 on a sampled "
    "likely outcome, as 1 - p: the gradient that is linear is the one with respect to v.",
)
def saturation(seed: int) -> None:
    mu = Case(seed).mu
    half_V = torch.tensor([0.5, 0.5], dtype=torch.float64)
    drive_V = torch.tensor([1.4, 0.6], dtype=torch.float64)

    def log_ratio(z: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.logsigmoid(torch.cat([z, -z])) + math.log(2)

    def slope(loss, z: float) -> float:
        return gradient(loss, torch.tensor([z], dtype=torch.float64)).item()

    def averaged(z: torch.Tensor) -> torch.Tensor:
        return surrogate.log_loss(log_ratio(z), drive_V, half_V, mu)

    def exact(z: torch.Tensor) -> torch.Tensor:
        return opo.objective(log_ratio(z).expm1(), drive_V, half_V, mu)

    def sampled(z: torch.Tensor) -> torch.Tensor:
        one_V = torch.tensor([1.0, 0.0], dtype=torch.float64)
        return surrogate.log_loss(log_ratio(z), drive_V, one_V, mu)

    close((slope(averaged, 40.0) - slope(averaged, 20.0)) / 20, mu / 2, rtol=1e-6)
    for z in (0.5, 3.0, 12.0):
        p = 1 / (1 + math.exp(-z))
        close(slope(exact, z), p * (1 - p) * (2 * mu * (2 * p - 1) - 0.8), rtol=1e-6)
        close(slope(sampled, z), (1 - p) * (mu * math.log(2 * p) - 1.4), rtol=1e-6)


@states(
    "OPO",
    "proposition 8.3",
    "Maximizing <omega, v> over the v of mean 0 with |v|^2 <= epsilon is the same problem, with mu "
    "the multiplier.",
    RADIUS,
    TOO_FAR,
    ("maths.trust_region.radius_of", "/ mu**2", "/ mu"),
    holds=CORRECTED,
    remark="mu = |omega - 1| / sqrt(epsilon) is twice the multiplier of the printed constraint "
    "(that of |v|^2 / 2 <= epsilon / 2). For a fixed mu the radius depends on alpha.",
)
def trust_region_duality(seed: int) -> None:
    case = Case(seed)
    radius = 0.3 + case.mu
    pair = (case.drive_V, case.anchor_V)
    best_V, mu = region.optimum(*pair, radius), region.multiplier(*pair, radius)
    close(case.norm(best_V) ** 2, radius)
    close(region.radius_of(*pair, mu.item()), radius)
    close(opo.closed_form(case.weight_V, case.anchor_V, mu.item()), best_V)

    def gain(v: torch.Tensor) -> torch.Tensor:
        return (case.anchor_V * case.weight_V * v).sum()

    for number in range(3):
        v = case.mean_zero(number)
        assert gain(v * radius**0.5 / case.norm(v)) < gain(best_V)
    gains = [gain(region.optimum(*pair, radius + step)) for step in (1e-4, -1e-4)]
    close((gains[0] - gains[1]) / 2e-4, mu / 2, rtol=1e-6)
    other_V = escort.escort_weight(case.anchor_V, case.target_V, case.alpha / 2) - 1
    assert region.radius_of(other_V, case.anchor_V, mu.item()) > 1.001 * radius


@states(
    "OPO",
    "proposition A.2, eq. 22",
    "Maximizing E[omega v] subject to E[v^2] <= epsilon has OPO's objective as its Lagrangian and "
    "the optimum omega / mu.",
    RADIUS,
    TOO_FAR,
    holds=CORRECTED,
    remark="The optimum of the problem as printed, which leaves out E[v] = 0; it has mean 1 / mu "
    "and so belongs to no policy. With the constraint it is proposition 8.3's. proxstep centers.",
)
def uncentered_trust_region(seed: int) -> None:
    case = Case(seed)
    radius = 0.3 + case.mu
    best_V = region.optimum(case.weight_V, case.anchor_V, radius)
    mu = region.multiplier(case.weight_V, case.anchor_V, radius)
    close(case.norm(best_V) ** 2, radius)
    close(best_V, case.weight_V / mu)
    close((case.anchor_V * best_V).sum(), 1 / mu)
    for number in range(3):
        v = case.function(number) * radius**0.5 / case.norm(case.function(number))
        assert (case.anchor_V * case.weight_V * (best_V - v)).sum() > 0


@states(
    "OPO",
    "lemma A.1, eq. 21",
    "For delta = max |Delta| < 1, |v - Delta| <= delta^2 e^delta / 2 and |v^2 - Delta^2| <= "
    "delta^3 e^(2 delta).",
    ("maths.surrogate.deviation_error_bound", "math.exp(largest) / 2", "math.exp(largest) / 2.1"),
    ("maths.surrogate.square_error_bound", "largest**3", "largest**3 / 1.1"),
    ("maths.surrogate.square_error_bound", "largest**3", "largest**4"),
    remark="For every delta, negative Delta included; both are sharp for small delta.",
)
def approximation_error(seed: int) -> None:
    for largest in (1e-3, 0.3, 1.0, 3.0, 0.1 + Case(seed).mu):
        delta_V = torch.cat([random(seed, 200).tanh(), torch.ones(1), -torch.ones(1)]) * largest
        v = delta_V.expm1()
        errors = ((v - delta_V).abs().max(), (v**2 - delta_V**2).abs().max())
        bounds = (surrogate.deviation_error_bound(largest), surrogate.square_error_bound(largest))
        for error, bound in zip(errors, bounds, strict=True):
            assert error <= bound
            if largest == 1e-3:
                assert error > 0.99 * bound


@states(
    "OPO",
    "lemma A.1, consequence",
    "Exact and surrogate loss differ at third order in Delta.",
    ("maths.surrogate.loss_error", "anchor_V) / 2", "anchor_V)"),
    LOG_LOSS,
    LOG_PENALTY,
    DISSIPATION,
    holds=FALSE,
    remark="The penalties do. The drives differ by E[omega Delta^2] / 2, at second order; with the "
    "drive omega - 1 by E[(omega - 1) Delta^2] / 2, which is of third order only where omega - 1 "
    "is as small as Delta, as it is around the optimum.",
)
def loss_difference(seed: int) -> None:
    case = Case(seed)
    anchor_V, log_ratio = case.anchor_V, softmax_log_ratio(case)

    def difference(size: float, drive_V: torch.Tensor) -> torch.Tensor:
        delta_V = log_ratio(size * case.function())
        exact = opo.objective(delta_V.expm1(), drive_V, anchor_V, case.mu)
        return surrogate.log_loss(delta_V, drive_V, anchor_V, case.mu) - exact

    delta_V = log_ratio(1e-3 * case.function())
    leading = surrogate.loss_error(delta_V, case.weight_V, anchor_V)
    close(difference(1e-3, case.weight_V), leading, rtol=2e-2)
    close(difference(1e-3, case.weight_V) / difference(5e-4, case.weight_V), 4.0, rtol=2e-2)
    third = surrogate.square_error_bound(delta_V.abs().max().item())
    assert difference(1e-3, 0 * anchor_V).abs() <= case.mu / 2 * third


@states(
    "OPO",
    "section 10, alpha near 1",
    "As alpha goes to 1 the uniform weights recover something like supervised fine-tuning.",
    SWAPPED_ESCORT,
    UNCENTERED,
    LOG_LOSS,
    holds=CORRECTED,
    remark="On the anchor's own samples, where it has no effect: v* is 0, and -E[Delta] is "
    "KL(pi_k, pi), which is smallest at the anchor.",
)
def uniform_weights(seed: int) -> None:
    case = Case(seed)
    anchor_V, log_ratio = case.anchor_V, softmax_log_ratio(case)
    weight_V = escort.escort_weight(anchor_V, case.target_V, 1.0)
    close(opo.closed_form(weight_V, anchor_V, case.mu), 0 * anchor_V)

    def loss(logit_V: torch.Tensor) -> torch.Tensor:
        return surrogate.log_loss(log_ratio(logit_V), weight_V, anchor_V, case.mu)

    close(gradient(loss, 0 * anchor_V), 0 * anchor_V)
    delta_V = log_ratio(case.function())
    divergence = -(anchor_V * delta_V).sum()
    close(loss(case.function()), case.mu / 2 * case.norm(delta_V) ** 2 + divergence)
