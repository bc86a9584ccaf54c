"""OPO, sections 3 and 4.1, appendices A.3 and A.4: coordinates, escort family, distances."""

from __future__ import annotations

import torch

from proxstep import algorithms as losses
from tests.theory.cases import Case, close, constant, counted, random
from tests.theory.maths import categorical, escort, opo
from tests.theory.registry import CORRECTED, FALSE, states

RATIO = ("maths.categorical.ratio", "prob_V / anchor_V", "anchor_V / prob_V")
DEVIATION = ("maths.categorical.deviation", "anchor_V) - 1", "anchor_V)")
EXPECTATION = ("maths.categorical.expectation", ".sum(dim=-1)", ".mean(dim=-1)")
SWAPPED_ESCORT = (
    "maths.escort._exponent",
    "alpha * anchor_V.log() + (1 - alpha) * target_V.log()",
    "(1 - alpha) * anchor_V.log() + alpha * target_V.log()",
)
WEIGHT = ("maths.escort.escort_weight", "alpha) / anchor_V", "alpha)")
CENTERED = (
    "maths.categorical.centered",
    "expectation(value_V, prob_V)[..., None]",
    "value_V.mean(dim=-1, keepdim=True)",
)
CHI_SQUARE = ("maths.categorical.chi_square", "inner(v_V, v_V, anchor_V)", "v_V.square().mean()")
KL = ("maths.categorical.kl", "xlogy(prob_V, other_V)", "xlogy(other_V, other_V)")


@states(
    "OPO",
    "definition 3.1, eq. 1",
    "The ratio t = pi / pi_k is e^Delta and the deviation v = t - 1 is e^Delta - 1.",
    RATIO,
    DEVIATION,
    ("maths.categorical.log_ratio", "prob_V.log() - anchor_V", "prob_V.log() + anchor_V"),
)
def ratio_coordinates(seed: int) -> None:
    case = Case(seed)
    pair = (case.policy_V, case.anchor_V)
    ratio_V, log_ratio_V = categorical.ratio(*pair), categorical.log_ratio(*pair)
    close(ratio_V, log_ratio_V.exp())
    close(categorical.deviation(*pair), log_ratio_V.expm1())
    f = case.function()
    close((case.anchor_V * ratio_V * f).sum(), (case.policy_V * f).sum())


@states(
    "OPO",
    "eq. 2",
    "The policy adds up to 1 exactly if t has mean 1 and v mean 0 under the anchor.",
    EXPECTATION,
    RATIO,
    DEVIATION,
    remark="For policies without outcomes that the anchor never takes.",
)
def conservation(seed: int) -> None:
    case = Case(seed)
    for measure_V in (case.policy_V, random(seed, len(case.anchor_V)).exp()):
        ratio_V = categorical.ratio(measure_V, case.anchor_V)
        deviation_V = categorical.deviation(measure_V, case.anchor_V)
        close(categorical.expectation(ratio_V, case.anchor_V), measure_V.sum())
        close(categorical.expectation(deviation_V, case.anchor_V), measure_V.sum() - 1)


@states(
    "OPO",
    "eq. 3",
    "The functions of mean 0 under the anchor are a closed subspace of L2(pi_k).",
    CENTERED,
    ("maths.categorical.centered", "value_V - expectation", "value_V + expectation"),
    remark="Checked as: f - E[f] is an orthogonal projection onto it.",
)
def mean_zero_subspace(seed: int) -> None:
    case = Case(seed)
    f, g = case.function(0), case.function(1)
    projected_f, projected_g = (categorical.centered(x, case.anchor_V) for x in (f, g))
    close((case.anchor_V * projected_f).sum(), 0.0)
    close(categorical.centered(projected_f, case.anchor_V), projected_f)
    close(categorical.centered(2 * f - g, case.anchor_V), 2 * projected_f - projected_g)
    products = (projected_f * g, f * projected_g)
    close(*((case.anchor_V * product).sum() for product in products))


@states(
    "OPO",
    "definition 4.1, eq. 4",
    "The escort distribution is the normalized geometric mean of anchor (alpha) and oracle.",
    SWAPPED_ESCORT,
)
def escort_distribution(seed: int) -> None:
    case = Case(seed)
    escort_V = escort.escort(case.anchor_V, case.target_V, case.alpha)
    close(escort_V.sum(), 1.0)
    product_V = case.anchor_V**case.alpha * case.target_V ** (1 - case.alpha)
    constant(escort_V / product_V)


@states(
    "OPO",
    "eq. 5",
    "The escort weight is the density of the escort with respect to the anchor.",
    WEIGHT,
    SWAPPED_ESCORT,
)
def escort_weight(seed: int) -> None:
    case = Case(seed)
    f = case.function()
    product_V = case.anchor_V**case.alpha * case.target_V ** (1 - case.alpha)
    escort_V = product_V / product_V.sum()
    close((case.anchor_V * case.weight_V * f).sum(), (escort_V * f).sum())


@states(
    "OPO",
    "eq. 6",
    "The escort weight has mean 1 under the anchor.",
    WEIGHT,
    ("maths.escort.escort", ".softmax(dim=-1)", ".exp()"),
    remark="`proxstep.algorithms.escort_weights` makes the mean over the sampled group exactly 1.",
)
def weight_has_mean_one(seed: int) -> None:
    case = Case(seed)
    close((case.anchor_V * case.weight_V).sum(), 1.0)


@states(
    "OPO",
    "proposition 4.2",
    "The escorts are an e-geodesic from the oracle (alpha 0) to the anchor (alpha 1), and omega is "
    "proportional to (e^A / pi_k)^(1 - alpha).",
    SWAPPED_ESCORT,
    ("maths.escort._exponent", "(1 - alpha) * target", "(1 - alpha) ** 2 * target"),
    ("maths.escort.oracle", "advantage_V.softmax", "(2 * advantage_V).softmax"),
)
def geodesic(seed: int) -> None:
    case = Case(seed)
    ends = {a: escort.escort(case.anchor_V, case.target_V, a) for a in (0.0, 1.0)}
    close(ends[0.0], case.target_V)
    close(ends[1.0], case.anchor_V)
    middle_V = escort.escort(case.anchor_V, case.target_V, 0.5)
    constant(middle_V.log() - (ends[0.0].log() + ends[1.0].log()) / 2)
    exponent_V = (1 - case.alpha) * (case.advantage_V - case.anchor_V.log())
    constant(case.weight_V.log() - exponent_V)


@states(
    "OPO",
    "eq. 7",
    "With the anchor frozen, omega is proportional to e^((1 - alpha) A) pi_k^-(1 - alpha).",
    SWAPPED_ESCORT,
    WEIGHT,
    remark="Read literally it is `escort_weights` with the correction log pi_k, whose spread over "
    "long sequences is tens of nats, so that one sequence takes all the weight. The default is "
    "appendix A.3's form.",
)
def on_policy_weight(seed: int) -> None:
    case = Case(seed)
    anchor_V, index_B = counted(seed)
    advantage_V, alpha = case.advantage_V, case.alpha
    sampled_B, _ = losses.escort_weights(
        advantage_V[index_B],
        torch.zeros_like(index_B),
        alpha=alpha,
        correction=anchor_V.log()[index_B],
    )
    weight_V = escort.escort_weight(anchor_V, escort.oracle(advantage_V), alpha)
    close(sampled_B, weight_V[index_B])
    constant(weight_V / (advantage_V.exp() / anchor_V) ** (1 - alpha))


@states(
    "OPO",
    "section 4.1, batch normalization",
    "Z-scoring omega over the batch stands for the unknown normalizer and gives mean 1.",
    CENTERED,
    WEIGHT,
    holds=FALSE,
    remark="Z-scored weights have mean 0, not 1. Dividing by the batch mean gives mean 1, for any "
    "normalizer: that is what proxstep does. The z-scored weight is offered as a drive, which is "
    "theorem 4.3's times mu / std.",
)
def batch_normalization(seed: int) -> None:
    case = Case(seed)
    anchor_V, index_B = counted(seed)
    weight_V = escort.escort_weight(anchor_V, case.target_V, case.alpha)
    close(weight_V[index_B].mean(), 1.0)
    score_B = losses.centered_weights(weight_V[index_B], torch.zeros_like(index_B), kind="zscore")
    close(score_B.mean(), 0.0)
    optimum_B = categorical.centered(weight_V, anchor_V)[index_B]
    close(score_B / score_B.norm(), optimum_B / optimum_B.norm(), rtol=1e-8)
    for normalizer in (0.1, 7.0):
        unknown_B = weight_V[index_B] * normalizer
        close(unknown_B / unknown_B.mean(), weight_V[index_B])


@states(
    "OPO",
    "eq. 8",
    "The dissipation is mu / 2 times the Pearson chi-square divergence.",
    ("maths.opo.dissipation", "mu / 2 * inner", "mu * inner"),
    CHI_SQUARE,
    DEVIATION,
)
def dissipation(seed: int) -> None:
    case = Case(seed)
    v = case.policy_V / case.anchor_V - 1
    pearson = (case.policy_V**2 / case.anchor_V).sum() - 1
    close(categorical.chi_square(case.policy_V, case.anchor_V), pearson)
    close(opo.dissipation(v, case.anchor_V, case.mu), case.mu * pearson / 2)


@states(
    "OPO",
    "appendix A.3, eq. 23",
    "The escort's log-density is affine in alpha up to the normalizer.",
    ("maths.escort.log_normalizer", ".logsumexp(dim=-1)", ".exp().sum(dim=-1)"),
    SWAPPED_ESCORT,
)
def log_density(seed: int) -> None:
    case = Case(seed)
    triple = (case.anchor_V, case.target_V, case.alpha)
    mixed_V = case.alpha * case.anchor_V.log() + (1 - case.alpha) * case.target_V.log()
    close(escort.escort(*triple).log(), mixed_V - escort.log_normalizer(*triple))


@states(
    "OPO",
    "appendix A.3, eq. 24",
    "The weight is proportional to (P* / pi_k)^(1 - alpha).",
    WEIGHT,
    SWAPPED_ESCORT,
    remark="The factor is 1 / Z.",
)
def importance_weight(seed: int) -> None:
    case = Case(seed)
    log_z = escort.log_normalizer(case.anchor_V, case.target_V, case.alpha)
    power_V = (case.target_V / case.anchor_V) ** (1 - case.alpha)
    close(case.weight_V, power_V / log_z.exp())


@states(
    "OPO",
    "appendix A.3, step 2",
    "On-policy the weight simplifies to e^((1 - alpha) A), the factor of pi_k being absorbed by "
    "the sampling measure.",
    ("maths.escort.tilted_oracle", "anchor_V.log() + advantage_V", "2 * advantage_V"),
    WEIGHT,
    holds=CORRECTED,
    remark="True for the oracle pi_k e^A, not for the printed oracle e^A: with samples from pi_k "
    "its factor pi_k^-(1 - alpha) stays. proxstep's default weights are those of pi_k e^A.",
)
def absorbed_factor(seed: int) -> None:
    case = Case(seed)
    anchor_V, index_B = counted(seed)
    tilted_V = escort.tilted_oracle(case.advantage_V, anchor_V)
    weight_V = escort.escort_weight(anchor_V, tilted_V, case.alpha)
    sampled_B, _ = losses.escort_weights(
        case.advantage_V[index_B], torch.zeros_like(index_B), alpha=case.alpha
    )
    close(sampled_B, weight_V[index_B])
    constant(weight_V / ((1 - case.alpha) * case.advantage_V).exp())
    printed_V = case.weight_V / ((1 - case.alpha) * case.advantage_V).exp()
    assert printed_V.max() / printed_V.min() > 1.01


@states(
    "OPO",
    "appendix A.3, step 3",
    "The interpolation is that of Renyi's divergence and an e-projection onto the geodesic.",
    KL,
    ("maths.escort.log_normalizer", ".logsumexp(dim=-1)", ".exp().sum(dim=-1)"),
    holds=CORRECTED,
    remark="It does not say of what it is the projection. What holds: alpha KL(q, pi_k) + "
    "(1 - alpha) KL(q, P*) = KL(q, rho) - log Z for every q, so rho is the policy nearest to both, "
    "and -log Z is (1 - alpha) times Renyi's divergence of order alpha.",
)
def nearest_to_both(seed: int) -> None:
    case = Case(seed)
    triple = (case.anchor_V, case.target_V, case.alpha)
    log_z, q = escort.log_normalizer(*triple), case.policy_V
    to_anchor, to_target = (categorical.kl(q, end) for end in triple[:2])
    nearest = categorical.kl(q, escort.escort(*triple)) - log_z
    close(case.alpha * to_anchor + (1 - case.alpha) * to_target, nearest)
    power_sum = (case.anchor_V * (case.anchor_V / case.target_V) ** (case.alpha - 1)).sum()
    renyi = power_sum.log() / (case.alpha - 1)
    close(-log_z, (1 - case.alpha) * renyi)


@states(
    "OPO",
    "proposition A.3, eq. 25",
    "The total variation is at most sqrt(chi-square) / 2.",
    ("maths.categorical.total_variation", "anchor_V) / 2", "anchor_V)"),
    CHI_SQUARE,
    remark="With equality where |v| is the same for every outcome. `opo` logs the bound.",
)
def total_variation_bound(seed: int) -> None:
    case = Case(seed)
    pair = (case.policy_V, case.anchor_V)
    variation = categorical.total_variation(*pair)
    gains_V = case.policy_V > case.anchor_V
    close(variation, (case.policy_V - case.anchor_V)[gains_V].sum())
    chi_square = categorical.chi_square(*pair)
    close(chi_square, (case.policy_V**2 / case.anchor_V).sum() - 1)
    assert variation <= chi_square.sqrt() / 2
    half_V = random(seed, 3).softmax(-1) / 2
    anchor_V, sign_V = half_V.repeat(2), torch.tensor([1.0, -1.0]).double()
    sign_V = sign_V.repeat_interleave(3)
    policy_V = anchor_V * (1 + 0.4 * sign_V)
    close(categorical.total_variation(policy_V, anchor_V), 0.2)
    close(categorical.chi_square(policy_V, anchor_V).sqrt() / 2, 0.2)


@states(
    "OPO",
    "section 10, entropy preservation",
    "-log pi diverges as pi(y) goes to 0 and so suppresses unlikely outcomes, while the finite "
    "(pi / pi_k - 1)^2 keeps their mass.",
    KL,
    CHI_SQUARE,
    holds=FALSE,
    remark="What diverges is KL(pi_k, pi), a penalty on removing an outcome. Removing one of "
    "mass p costs the chi-square only p / (1 - p), and KL(pi, pi_k) only -log(1 - p): of the "
    "three the first alone preserves support.",
)
def cost_of_removing_an_outcome(seed: int) -> None:
    case = Case(seed)
    anchor_V, mass = case.anchor_V, case.anchor_V[0]
    removed_V = torch.cat([anchor_V.new_zeros(1), anchor_V[1:] / (1 - mass)])
    close(categorical.chi_square(removed_V, anchor_V), mass / (1 - mass))
    close(categorical.kl(removed_V, anchor_V), -torch.log1p(-mass))
    assert categorical.kl(anchor_V, removed_V).isinf()
