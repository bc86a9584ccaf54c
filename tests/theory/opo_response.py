"""OPO, sections 4.3 to 6: the optimum, its three derivations, and what they are said to mean."""

from __future__ import annotations

import torch

from tests.theory.cases import Case, close, gradient, hessian, random, variance
from tests.theory.maths import categorical, escort, fisher, opo, simplex, surrogate
from tests.theory.opo_geometry import CENTERED, DEVIATION, KL, WEIGHT
from tests.theory.registry import CORRECTED, FALSE, states

OBJECTIVE = ("maths.opo.objective", "mu) - work", "mu) + work")
DISSIPATION = ("maths.opo.dissipation", "mu / 2 * inner", "mu * inner")
UNCENTERED = ("maths.opo.closed_form", "centered(weight_V, anchor_V)", "weight_V")
OTHER_MU = ("maths.opo.closed_form", "mu=mu", "mu=mu + 1")
INNER = ("maths.categorical.inner", "left_V * right_V", "left_V + right_V")
BASIS = ("maths.opo.hilbert_projection", "basis_VV[:, 1:]", "basis_VV[:, :-1]")
UNWEIGHTED_BASIS = ("maths.opo.hilbert_projection", "root_V * value_V", "value_V")


@states(
    "OPO",
    "eq. 9",
    "The update maximizes the work <omega, v> less mu / 2 |v|^2 among the v of mean 0.",
    UNCENTERED,
    OTHER_MU,
    OBJECTIVE,
    DISSIPATION,
    remark="v >= -1 is not among the constraints: see section 8.5.",
)
def work_less_dissipation(seed: int) -> None:
    case = Case(seed)
    context = (case.weight_V, case.anchor_V, case.mu)
    optimum_V = opo.closed_form(*context)
    close((case.anchor_V * optimum_V).sum(), 0.0)
    for number in range(3):
        v = case.mean_zero(number)
        excess = opo.objective(v, *context) - opo.objective(optimum_V, *context)
        close(excess, case.mu / 2 * case.norm(v - optimum_V) ** 2)


@states(
    "OPO",
    "eq. 10",
    "As a loss: -E[omega v] + mu / 2 E[v^2].",
    OBJECTIVE,
    DISSIPATION,
    DEVIATION,
    remark="For a policy the work is E_pi[omega] - 1, the gain in expected escort weight.",
)
def loss_form(seed: int) -> None:
    case = Case(seed)
    v = categorical.deviation(case.policy_V, case.anchor_V)
    work = (case.policy_V * case.weight_V).sum() - 1
    pearson = (case.policy_V**2 / case.anchor_V).sum() - 1
    loss = opo.objective(v, case.weight_V, case.anchor_V, case.mu)
    close(loss, case.mu / 2 * pearson - work)


@states(
    "OPO",
    "theorem 4.3, eq. 11",
    "The unique optimum is (omega - 1) / mu, with multiplier 1.",
    UNCENTERED,
    OTHER_MU,
    ("maths.opo.lagrange", "mu * torch.diag(anchor_V)", "torch.diag(anchor_V)"),
    ("maths.opo.lagrange", "anchor_V * weight_V", "weight_V"),
)
def closed_form(seed: int) -> None:
    case = Case(seed)
    context = (case.weight_V, case.anchor_V, case.mu)
    optimum_V, multiplier = opo.lagrange(*context)
    close(optimum_V, (case.weight_V - 1) / case.mu)
    close(opo.closed_form(*context), optimum_V)
    close(multiplier, 1.0)


@states(
    "OPO",
    "eq. 12",
    "The new policy is pi_k (1 + (omega - 1) / mu).",
    ("maths.categorical.policy_of", "(1 + deviation_V)", "(1 - deviation_V)"),
    UNCENTERED,
    remark="It adds up to 1 for every mu; it is positive only from `simplex.smallest_mu` on.",
)
def policy_update(seed: int) -> None:
    case = Case(seed)
    new_V = opo.update(case.weight_V, case.anchor_V, case.mu)
    close(new_V.sum(), 1.0)
    close(new_V / case.anchor_V, 1 + (case.weight_V - 1) / case.mu)


@states(
    "OPO",
    "figure 1, linear response",
    "The response is the susceptibility 1 / mu times the centered driving force.",
    UNCENTERED,
    OTHER_MU,
    KL,
    remark="Exactly linear here. Any other smooth energy of curvature mu at the anchor has the "
    "same response to first order: mu KL(pi, pi_k) gives pi_k e^(omega / mu).",
)
def linear_response(seed: int) -> None:
    case = Case(seed)
    f = case.function()
    at = [opo.closed_form(case.weight_V + s * f, case.anchor_V, case.mu) for s in (0.0, 1.0)]
    close(at[1] - at[0], case.mean_zero() / case.mu)
    stiff = 1e4 * case.weight_V.max().item()
    tilted_V = (case.anchor_V.log() + case.weight_V / stiff).softmax(-1)
    response_V = opo.closed_form(case.weight_V, case.anchor_V, stiff)
    close(tilted_V / case.anchor_V - 1, response_V, rtol=0, atol=1e-3 * response_V.abs().max())

    def value(policy_V: torch.Tensor) -> torch.Tensor:
        return (policy_V * case.weight_V).sum() - stiff * categorical.kl(policy_V, case.anchor_V)

    assert value(tilted_V) > value(case.policy_V)
    close(value(tilted_V), stiff * (case.anchor_V.log() + case.weight_V / stiff).logsumexp(-1))


@states(
    "OPO",
    "eq. 13",
    "The Bregman divergence of |v|^2 / 2 is the Pearson chi-square divergence.",
    ("maths.opo.mirror_divergence", "energies / 2 - inner", "energies - inner"),
    ("maths.opo.mirror_divergence", "energies / 2 - inner", "energies / 2 + inner"),
    holds=CORRECTED,
    remark="It is half of it, as its formula says.",
)
def bregman_divergence(seed: int) -> None:
    case = Case(seed)
    v, w = case.mean_zero(0), case.mean_zero(1)
    close(opo.mirror_divergence(v, w, case.anchor_V), case.norm(v - w) ** 2 / 2)
    deviation_V = case.policy_V / case.anchor_V - 1
    half = categorical.chi_square(case.policy_V, case.anchor_V) / 2
    close(opo.mirror_divergence(deviation_V, 0 * v, case.anchor_V), half)


@states(
    "OPO",
    "eq. 14",
    "A mirror step from the anchor is the same update.",
    ("maths.opo.mirror_step", "drive_V / mu", "drive_V"),
    ("maths.opo.mirror_step", "start_V +", "start_V -"),
    CENTERED,
)
def mirror_step(seed: int) -> None:
    case = Case(seed)
    origin_V, start_V = 0 * case.anchor_V, case.mean_zero(1)
    context = (case.weight_V, case.anchor_V, case.mu)
    close(opo.mirror_step(origin_V, *context), opo.lagrange(*context)[0])

    def value(v: torch.Tensor) -> torch.Tensor:
        divergence = opo.mirror_divergence(v, start_V, case.anchor_V)
        return case.mu * divergence - (case.anchor_V * case.weight_V * v).sum()

    stepped_V = opo.mirror_step(start_V, *context)
    for number in (2, 3):
        v = case.mean_zero(number)
        close(value(v) - value(stepped_V), case.mu / 2 * case.norm(v - stepped_V) ** 2)


@states(
    "OPO",
    "eq. 15, lemma 6.1",
    "Multiplication by omega is bounded, self-adjoint and positive, and <f, omega g> is the inner "
    "product under the escort.",
    WEIGHT,
    INNER,
    remark="Nothing follows from it: section 6.2 projects in L2(pi_k). Projected in the escort's "
    "inner product omega becomes omega - 1 / (omega E[1 / omega]), another update.",
)
def escort_inner_product(seed: int) -> None:
    case = Case(seed)
    f, g, omega_V, anchor_V = case.function(0), case.function(1), case.weight_V, case.anchor_V
    escort_V = escort.escort(anchor_V, case.target_V, case.alpha)
    close(categorical.inner(f, omega_V * g, anchor_V), (escort_V * f * g).sum())
    close(categorical.inner(omega_V * f, g, anchor_V), (escort_V * f * g).sum())
    assert categorical.inner(f, omega_V * f, anchor_V) > 0
    assert case.norm(omega_V * f) <= omega_V.max() * case.norm(f)
    peak_V = (omega_V == omega_V.max()).double()
    close(case.norm(omega_V * peak_V) / case.norm(peak_V), omega_V.max())
    other_V = omega_V - 1 / (omega_V * (anchor_V / omega_V).sum())
    close((anchor_V * other_V).sum(), 0.0)
    close((escort_V * (omega_V - other_V) * case.mean_zero()).sum(), 0.0)
    assert (other_V - (omega_V - 1)).abs().max() > 1e-2


@states(
    "OPO",
    "eq. 16",
    "Completing the square: the work less the dissipation is -mu / 2 |v - omega / mu|^2 plus a "
    "constant.",
    OBJECTIVE,
    DISSIPATION,
    INNER,
)
def completed_square(seed: int) -> None:
    case = Case(seed)
    v = case.function()
    value = -opo.objective(v, case.weight_V, case.anchor_V, case.mu)
    square = case.norm(v - case.weight_V / case.mu) ** 2
    close(value, -case.mu / 2 * square + case.norm(case.weight_V) ** 2 / (2 * case.mu))


@states(
    "OPO",
    "eq. 17",
    "The update is the v of mean 0 that is nearest to omega / mu.",
    BASIS,
    UNWEIGHTED_BASIS,
)
def nearest_deviation(seed: int) -> None:
    case = Case(seed)
    point_V = case.weight_V / case.mu
    nearest_V = opo.hilbert_projection(point_V, case.anchor_V)
    close((case.anchor_V * nearest_V).sum(), 0.0)
    for number in range(3):
        v = case.mean_zero(number)
        legs = case.norm(v - nearest_V) ** 2 + case.norm(nearest_V - point_V) ** 2
        close(case.norm(v - point_V) ** 2, legs)


@states(
    "OPO",
    "eq. 18",
    "The projection of omega / mu is (omega - <omega, 1>) / mu, theorem 4.3 again.",
    BASIS,
    UNWEIGHTED_BASIS,
    UNCENTERED,
    CENTERED,
)
def projection_theorem(seed: int) -> None:
    case = Case(seed)
    projected_V = opo.hilbert_projection(case.weight_V, case.anchor_V) / case.mu
    close(projected_V, (case.weight_V - 1) / case.mu)
    close(opo.closed_form(case.weight_V, case.anchor_V, case.mu), projected_V)
    f = case.function()
    close(opo.hilbert_projection(f, case.anchor_V), categorical.centered(f, case.anchor_V))


@states(
    "OPO",
    "remark 6.2",
    "Centering is the projection; as alpha goes to 1 omega becomes A and the optimum the z-scored "
    "advantage over mu.",
    ("maths.escort.tilted_oracle", "anchor_V.log() + advantage_V", "2 * advantage_V"),
    ("maths.escort.oracle", "advantage_V.softmax", "(2 * advantage_V).softmax"),
    CENTERED,
    OTHER_MU,
    holds=FALSE,
    remark="The projection is centering alone, without the division by the standard deviation. And "
    "as alpha goes to 1 omega becomes 1 and the update 0 (definition 4.1). What does hold: "
    "(omega - 1) / (1 - alpha) tends to A - log pi_k, centered; with the oracle pi_k e^A, to "
    "A - E[A].",
)
def z_scores(seed: int) -> None:
    case = Case(seed)
    anchor_V, small = case.anchor_V, 1e-6
    oracles = {
        escort.oracle(case.advantage_V): case.advantage_V - anchor_V.log(),
        escort.tilted_oracle(case.advantage_V, anchor_V): case.advantage_V,
    }
    for target_V, limit_V in oracles.items():
        weight_V = escort.escort_weight(anchor_V, target_V, 1 - small)
        close(weight_V, torch.ones_like(weight_V), atol=1e-4)
        optimum_V = opo.closed_form(weight_V, anchor_V, case.mu)
        expected_V = (limit_V - (anchor_V * limit_V).sum()) / case.mu
        close(optimum_V / small, expected_V, rtol=1e-4, atol=1e-4)
    optimum_V = opo.closed_form(case.weight_V, anchor_V, case.mu)
    spread = variance(case.weight_V, anchor_V)
    close(variance(optimum_V, anchor_V), spread / case.mu**2)
    assert abs(spread - 1) > 1e-3


@states(
    "OPO",
    "remark 6.3",
    "The Fisher metric and the Hessians of KL and of logistic objectives depend on the policy; "
    "OPO's is mu I everywhere.",
    DISSIPATION,
    ("maths.categorical.kl", "(xlogy(prob_V, prob_V)", "(prob_V**2"),
    ("maths.fisher.fisher_matrix", "prob_V[:, None] * score_VP", "score_VP"),
    remark="In the coordinates v, and in L2(pi_k). In the parameters of a policy OPO's Hessian "
    "depends on the policy like the others': see figure 3.",
)
def constant_metric(seed: int) -> None:
    case = Case(seed)
    anchor_V = case.anchor_V
    for prob_V in (anchor_V, case.policy_V):
        score_VP = fisher.scores(lambda logit_V: logit_V.log_softmax(-1), prob_V.log())
        expected = torch.diag(prob_V) - torch.outer(prob_V, prob_V)
        close(fisher.fisher_matrix(score_VP, prob_V), expected)
        v = prob_V / anchor_V - 1
        curvature_VV = hessian(lambda v: opo.dissipation(v, anchor_V, case.mu), v)
        close(curvature_VV, case.mu * torch.diag(anchor_V))
        curvature_VV = hessian(lambda v: categorical.kl(anchor_V * (1 + v), anchor_V), v)
        close(curvature_VV, torch.diag(anchor_V / (1 + v)))
    beta, margin = 1.7, random(seed, 1)
    slope = hessian(lambda m: -torch.nn.functional.logsigmoid(beta * m).sum(), margin)
    sigma = torch.sigmoid(beta * margin)
    close(slope, (beta**2 * sigma * (1 - sigma))[:, None])


@states(
    "OPO",
    "theorem 8.1",
    "The gradient is -omega + mu v and the Hessian mu I; alpha changes the target and not the "
    "curvature, mu the curvature and not the target.",
    ("maths.opo.gradient", "mu * deviation_V - drive_V", "mu * deviation_V + drive_V"),
    OBJECTIVE,
    DISSIPATION,
    UNCENTERED,
    holds=CORRECTED,
    remark="The target (omega - 1) / mu does depend on mu: its length, not its direction. Once "
    "v >= -1 binds, its direction too. And the surrogate of eq. 19 has the Hessian mu + drive in "
    "v at the anchor: only eq. 10's curvature is constant.",
)
def decoupling(seed: int) -> None:
    case = Case(seed)
    v, anchor_V = case.mean_zero(), case.anchor_V
    for alpha in (0.1, 0.8):
        weight_V = escort.escort_weight(anchor_V, case.target_V, alpha)

        def loss(v: torch.Tensor, weight_V: torch.Tensor = weight_V) -> torch.Tensor:
            return opo.objective(v, weight_V, anchor_V, case.mu)

        close(gradient(loss, v), anchor_V * opo.gradient(v, weight_V, case.mu))
        close(hessian(loss, v), case.mu * torch.diag(anchor_V))
        targets = [opo.closed_form(weight_V, anchor_V, k * case.mu) for k in (1.0, 3.0)]
        close(targets[0], 3 * targets[1])
        close(opo.gradient(targets[0], weight_V - 1, case.mu), 0 * v)
        assert targets[0].abs().max() > 1e-3
    origin_V = torch.zeros_like(v)
    for drive_V in (case.weight_V, case.drive_V):

        def log_loss(v: torch.Tensor, drive_V: torch.Tensor = drive_V) -> torch.Tensor:
            return surrogate.log_loss(v.log1p(), drive_V, anchor_V, case.mu)

        close(hessian(log_loss, origin_V), torch.diag(anchor_V * (case.mu + drive_V)))
    tight = 1 - case.weight_V.min().item()
    bound = [simplex.constrained_optimum(case.weight_V, anchor_V, k * tight) for k in (0.3, 0.6)]
    product = (anchor_V * bound[0] * bound[1]).sum()
    assert product < (1 - 1e-6) * case.norm(bound[0]) * case.norm(bound[1])
