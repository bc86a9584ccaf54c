"""OPO, section 8.5: when the update is a policy, and what keeps it one."""

from __future__ import annotations

import torch

from proxstep import algorithms as losses
from tests.theory.cases import Case, close
from tests.theory.maths import categorical, descent, opo, simplex
from tests.theory.opo_response import UNCENTERED
from tests.theory.registry import CORRECTED, FALSE, states


@states(
    "OPO",
    "proposition 8.4",
    "The update is a policy whenever mu >= max omega - 1.",
    ("maths.simplex.smallest_mu", "1 - weight_V.min()", "weight_V.max() - 1"),
    ("maths.simplex.printed_smallest_mu", "weight_V.max() - 1", "1 - weight_V.min()"),
    UNCENTERED,
    holds=FALSE,
    remark="That bounds v* by 1 from above. v* >= -1 needs mu >= 1 - min omega, which mu >= 1 "
    "always satisfies. omega = (0, 1.5, 1.5) with mu = 0.5 satisfies the printed condition and has "
    "v* = -2. `positivity` logs both.",
)
def positivity(seed: int) -> None:
    case = Case(seed)
    least = simplex.smallest_mu(case.weight_V).item()
    close(opo.closed_form(case.weight_V, case.anchor_V, least).min(), -1.0)
    assert (opo.update(case.weight_V, case.anchor_V, 1.001 * least) >= 0).all()
    assert (opo.update(case.weight_V, case.anchor_V, 0.999 * least) < 0).any()
    assert least <= 1
    third_V = torch.full((3,), 1 / 3, dtype=torch.float64)
    weight_V = torch.tensor([0.0, 1.5, 1.5], dtype=torch.float64)
    printed = simplex.printed_smallest_mu(weight_V).item()
    close(printed, 0.5)
    close(opo.closed_form(weight_V, third_V, printed)[0], -2.0)
    assert losses.safeguards.positivity(weight_V, mu=printed)["frac_negative_target"] > 0


@states(
    "OPO",
    "section 8.5, safeguards",
    "Positivity is kept by a large mu, by clipping v* or by projecting onto the simplex, without "
    "altering the local convergence.",
    ("maths.simplex.project", "(1 - mass_V)", "(1 + mass_V)"),
    ("maths.simplex.project", "shift_V[kept - 1]", "shift_V[-1]"),
    ("maths.simplex.constrained_optimum", "weight_V / mu", "weight_V"),
    UNCENTERED,
    holds=CORRECTED,
    remark="Clipping alone is no policy: the mean becomes positive. The projection in L2(pi_k) is "
    "the exact optimum of eq. 9 under v >= -1, max((omega - lambda) / mu, -1), and descent with it "
    "contracts at least as fast as corollary 8.2 says.",
)
def safeguards(seed: int) -> None:
    case = Case(seed)
    anchor_V, weight_V = case.anchor_V, case.weight_V
    mu = 0.5 * (1 - weight_V.min().item())
    response_V = opo.closed_form(weight_V, anchor_V, mu)
    optimum_V = simplex.constrained_optimum(weight_V, anchor_V, mu)
    assert (anchor_V * response_V.clamp(min=-1)).sum() > 1e-3
    close((anchor_V * optimum_V).sum(), 0.0)
    assert optimum_V.min() == -1
    close(simplex.project(response_V, anchor_V), optimum_V)
    slack_V = weight_V - mu * optimum_V
    gains_V = slack_V - (anchor_V * (1 + optimum_V) * slack_V).sum()
    assert gains_V.max() < 1e-10  # no corner of the simplex lies uphill of the optimum
    v, rate = categorical.deviation(case.policy_V, anchor_V), descent.contraction(mu, 0.6 / mu)
    for _ in range(5):
        before = case.norm(v - optimum_V)
        v = simplex.project(descent.path(v, weight_V - 1, mu, 0.6 / mu, 1)[1], anchor_V)
        assert case.norm(v - optimum_V) <= rate * before + 1e-12
    mild_V = simplex.constrained_optimum(weight_V, anchor_V, 1.0)
    close(mild_V, opo.closed_form(weight_V, anchor_V, 1.0))
