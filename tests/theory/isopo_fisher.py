"""ISOPO, sections 1.2 and 2.0.2: the Fisher metric, the natural gradient, the estimates."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from proxstep.isopo.linear import OuterGradients
from tests.theory.cases import Model, close, gradient, hessian, random
from tests.theory.maths import categorical, estimates, fisher
from tests.theory.registry import CORRECTED, states

FISHER = ("maths.fisher.fisher_matrix", "prob_V[:, None] * score_VP", "score_VP")
SQUARE = ("maths.fisher.fisher_square", ".square()", ".abs()")
NATURAL = ("maths.fisher.natural_gradient", "(eigenvector_PP.mT @ gradient_P)", "gradient_P")
POLICY = ("maths.fisher.policy_gradient", "prob_V * advantage_V", "advantage_V")
POSITIONS = (
    "maths.estimates.position_square",
    "direction_P).square().sum()",
    "direction_P).abs().sum()",
)
UNNORMALIZED = ("maths.estimates.position_square", " / gradient_TP.square().sum()", "")
OVERLAPS = ("maths.estimates.linear_overlaps", "(grad_TO * (", "(grad_TO + (")
NORMS = ("maths.estimates.linear_squares", "input_TI.square()", "input_TI.abs()")


@states(
    "ISOPO",
    "section 1.2, eq. 1",
    "v.F v is the mean square of the change of the log-probability, the squared Fisher metric.",
    FISHER,
    SQUARE,
    holds=CORRECTED,
    remark="The text sets |v|_F = v.F v, without the square that eq. 2 and all later formulas "
    "have.",
)
def fisher_metric(seed: int) -> None:
    model = Model(seed)
    v = model.direction_P
    square = v @ fisher.fisher_matrix(model.score_VP, model.prob_V) @ v
    close(square, v @ model.fisher_PP @ v)
    close(fisher.fisher_square(v, model.score_VP, model.prob_V), square)
    moved = [gradient(lambda at, y=y: model.log_prob(at)[y], model.theta_P) @ v for y in range(10)]
    close(square, (model.prob_V * torch.stack(moved) ** 2).sum())


@states(
    "ISOPO",
    "section 1.2, divergences",
    "To leading order v.F v is the KL divergence, or the chi-square, that the step v causes.",
    FISHER,
    ("maths.categorical.kl", "xlogy(prob_V, other_V)", "2 * xlogy(prob_V, other_V)"),
    ("maths.categorical.chi_square", "inner(v_V, v_V, anchor_V)", "v_V.square().mean()"),
    holds=CORRECTED,
    remark="True of the chi-square; the KL divergence, in either direction, is half of it.",
)
def divergences(seed: int) -> None:
    model = Model(seed)
    here_V, theta_P = model.prob_V, model.theta_P
    fisher_PP = fisher.fisher_matrix(model.score_VP, here_V)
    kl, chi_square = categorical.kl, categorical.chi_square
    close(hessian(lambda at: kl(here_V, model.log_prob(at).exp()), theta_P), fisher_PP)
    close(hessian(lambda at: kl(model.log_prob(at).exp(), here_V), theta_P), fisher_PP)
    close(hessian(lambda at: chi_square(model.log_prob(at).exp(), here_V), theta_P), 2 * fisher_PP)
    step_P = 1e-3 * model.direction_P
    moved = [model.log_prob(theta_P + sign * step_P).exp() for sign in (1, -1)]
    square = step_P @ fisher_PP @ step_P
    close(sum(kl(here_V, there_V) for there_V in moved) / 2, square / 2, rtol=1e-3)
    close(sum(chi_square(there_V, here_V) for there_V in moved) / 2, square, rtol=1e-3)


@states(
    "ISOPO",
    "section 1.2, natural gradient",
    "F^-1 g, with g = E[A d log pi], points to the policy gradient and away from where the "
    "divergence grows quickest.",
    NATURAL,
    POLICY,
    FISHER,
    remark="It maximizes g.v - v.F v / 2, and g.v among all v of its Fisher length.",
)
def natural_gradient(seed: int) -> None:
    model = Model(seed)
    context = (model.score_VP, model.prob_V)
    gradient_P = fisher.policy_gradient(*context, model.advantage_V)
    reward = gradient(
        lambda at: (model.log_prob(at).exp() * model.advantage_V).sum(), model.theta_P
    )
    close(gradient_P, reward)
    close(fisher.policy_gradient(*context, model.advantage_V + 3), gradient_P)
    natural_P = fisher.natural_gradient(*context, model.advantage_V)
    close(model.fisher_PP @ natural_P, gradient_P)

    def value(v: Tensor) -> Tensor:
        return gradient_P @ v - v @ model.fisher_PP @ v / 2

    for number in range(3):
        v = random(seed + number, 4)
        off_P = v - natural_P
        close(value(natural_P) - value(v), off_P @ model.fisher_PP @ off_P / 2)
        length = (natural_P @ model.fisher_PP @ natural_P).sqrt()
        assert gradient_P @ natural_P > gradient_P @ v * length / (v @ model.fisher_PP @ v).sqrt()


@states(
    "ISOPO",
    "section 1.2, advantages",
    "F^-1 does not involve the advantage, so large advantages are not penalized.",
    (
        "maths.fisher.natural_gradient",
        "fisher_matrix(score_VP, prob_V)",
        "fisher_matrix(score_VP, prob_V * advantage_V.square())",
    ),
    remark="Checked as: the natural gradient is linear in A.",
)
def linear_in_advantages(seed: int) -> None:
    model = Model(seed)
    context, other_V = (model.score_VP, model.prob_V), random(seed + 9, 10)
    for damping in (0.0, 0.3):
        first_P = fisher.natural_gradient(*context, model.advantage_V, damping)
        second_P = fisher.natural_gradient(*context, other_V, damping)
        mixed_V = 10 * model.advantage_V - other_V
        mixed_P = fisher.natural_gradient(*context, mixed_V, damping)
        close(mixed_P, 10 * first_P - second_P)


@states(
    "ISOPO",
    "section 2.0.2, eq. 2",
    "|v|_F^2 is about (1 / n) sum_i (v.g_i)^2 over sampled sequences.",
    ("maths.estimates.sequence_square", ".mean()", ".sum()"),
    ("maths.estimates.sequence_square", ".square()", ".abs()"),
    remark="Unbiased for a v that does not depend on the sample. For a v that is one of the "
    "sampled gradients its own term |v|^4 / n is added, and the others count (n - 1) / n. The g_i "
    "are gradients of log-probabilities, without advantages.",
)
def sequence_estimate(seed: int) -> None:
    model = Model(seed)
    score_VP, prob_V, v = model.score_VP, model.prob_V, model.direction_P
    fixed = own = torch.zeros((), dtype=torch.float64)
    for i, first_P in enumerate(score_VP):
        for j, second_P in enumerate(score_VP):
            chance, pair = prob_V[i] * prob_V[j], torch.stack([first_P, second_P])
            fixed = fixed + chance * estimates.sequence_square(v, pair)
            own = own + chance * estimates.sequence_square(first_P, pair)
    close(fixed, v @ model.fisher_PP @ v)
    square_V = score_VP.square().sum(1)
    independent = (model.fisher_PP @ model.fisher_PP).trace()
    close(own, ((prob_V * square_V**2).sum() + independent) / 2)


def two_tokens(seed: int, carry: float) -> Callable[[Tensor], Tensor]:
    """log pi of two tokens out of three each, (3, 3), as a function of two copies of W, (2, 6).

    One copy acts at each position. With `carry` the first position's output also enters the second
    token's logits, as a transformer's later layers would have it.
    """
    first_D, second_YD, mix = random(seed, 2), random(seed + 1, 3, 2), random(seed + 2, 3, 3)

    def log_probs(copies: Tensor) -> Tensor:
        first_W, second_W = copies.view(2, 3, 2)
        out_Y = first_W @ first_D
        second_YY = second_YD @ second_W.mT + carry * (mix @ out_Y)
        return torch.stack([out_Y.log_softmax(-1)[:, None].expand(3, 3), second_YY.log_softmax(-1)])

    return log_probs


@states(
    "ISOPO",
    "section 2.0.2, unreduced gradients",
    "(v.sum_j g_j)^2 is about sum_j (v.g_j)^2, if the gradients of single positions are "
    "uncorrelated.",
    ("maths.categorical.inner", "left_V * right_V", "left_V + right_V"),
    (
        "maths.fisher.scores",
        "torch.func.jacrev(log_prob_of)(theta_P)",
        "torch.func.jacrev(lambda at: log_prob_of(at).exp())(theta_P)",
    ),
    holds=CORRECTED,
    remark="Exact in the mean for the scores of single tokens, which are martingale differences. "
    "ISOPO's g_j are gradients by position, where position j also moves later tokens (footnote 1): "
    "then they are correlated, and it is an approximation.",
)
def uncorrelated_positions(seed: int) -> None:
    weight, v = 0.5 * random(seed + 3, 6), random(seed + 4, 6)
    copies = weight.repeat(2)
    for carry in (0.0, 1.0):
        log_probs = two_tokens(seed, carry)
        prob = log_probs(copies).sum(0).exp().flatten()

        def by_token(at: Tensor, j: int, log_probs: Callable = log_probs) -> Tensor:
            return log_probs(at.repeat(2))[j].flatten()

        tokens = [fisher.scores(lambda at, j=j: by_token(at, j), weight) @ v for j in (0, 1)]
        whole = fisher.scores(lambda at, f=log_probs: f(at).sum(0).flatten(), copies)
        positions = list((whole.view(9, 2, 6) @ v).unbind(1))
        close(sum(tokens), sum(positions))
        exact = categorical.inner(sum(tokens), sum(tokens), prob)
        close(sum(categorical.inner(g, g, prob) for g in tokens), exact)
        error = sum(categorical.inner(g, g, prob) for g in positions) - exact
        close(error, -2 * categorical.inner(*positions, prob))
        assert (error.abs() > 1e-9 * exact) == (carry > 0)


@states(
    "ISOPO",
    "section 2.0.2, eq. 3",
    "|v|_F^2 is about sum_j (v.g_j)^2 / sum_j |g_j|^2.",
    POSITIONS,
    UNNORMALIZED,
    holds=CORRECTED,
    remark="The division by |g|^2 changes the unit: it estimates v.F v / trace F, which is eq. 2's "
    "over E|g|^2. It does not depend on the samples' scale or number, and is at most |v|^2. The "
    "bound C of section 2.0.1 is therefore one per layer, up to that layer's trace.",
)
def position_estimate(seed: int) -> None:
    model = Model(seed)
    v, rows = model.direction_P, model.prob_V.sqrt()[:, None] * model.score_VP
    estimate = estimates.position_square(v, rows)
    close(estimate, v @ model.fisher_PP @ v / model.fisher_PP.trace())
    close(estimates.position_square(v, 7 * rows.repeat(3, 1)), estimate)
    close(estimates.position_square(v, v[None]), v @ v)
    sample_PN = model.score_VP[:4]
    by_sequence = estimates.sequence_square(v, sample_PN)
    mean_square = sample_PN.square().sum(1).mean()
    close(estimates.position_square(v, sample_PN), by_sequence / mean_square)


def linear_layer(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """V (3, 4), and the gradients of outputs (6, 3) and the inputs (6, 4) of six positions."""
    return random(seed, 3, 4), random(seed + 1, 6, 3), random(seed + 2, 6, 4)


@states(
    "ISOPO",
    "section 2.0.2, eq. 4",
    "For a linear layer v.g_j is g_out,j . V a_in,j.",
    OVERLAPS,
)
def overlaps(seed: int) -> None:
    direction_OI, grad_TO, input_TI = linear_layer(seed)
    outer_TOI = grad_TO[:, :, None] * input_TI[:, None, :]
    expected_T = (outer_TOI * direction_OI).sum(dim=(1, 2))
    close(estimates.linear_overlaps(direction_OI, grad_TO, input_TI), expected_T)


@states(
    "ISOPO",
    "section 2.0.2, eq. 5",
    "|g_j|^2 is |g_out,j|^2 |a_in|^2.",
    NORMS,
    holds=CORRECTED,
    remark="With a_in,j: the index is left out.",
)
def norms(seed: int) -> None:
    _, grad_TO, input_TI = linear_layer(seed)
    outer_TOI = grad_TO[:, :, None] * input_TI[:, None, :]
    close(estimates.linear_squares(grad_TO, input_TI), (outer_TOI**2).sum(dim=(1, 2)))


@states(
    "ISOPO",
    "section 2.0.2, eq. 6",
    "|v|_F is about the root of eq. 4's sum over the root of eq. 5's.",
    OVERLAPS,
    NORMS,
    ("maths.estimates.linear_norm", "overlap_T.square().sum().sqrt()", "overlap_T.square().sum()"),
    POSITIONS,
    holds=CORRECTED,
    remark="With a_in,j: the index is left out. The unit is that of eq. 3.",
)
def linear_norm(seed: int) -> None:
    direction_OI, grad_TO, input_TI = linear_layer(seed)
    outer_TOI = grad_TO[:, :, None] * input_TI[:, None, :]
    norm = estimates.linear_norm(direction_OI, grad_TO, input_TI)
    close(norm**2, estimates.position_square(direction_OI.flatten(), outer_TOI.flatten(1)))
    close(norm**2, library_squares(grad_TO, input_TI, direction_OI))


def library_squares(grad_TO: Tensor, input_TI: Tensor, direction_OI: Tensor) -> Tensor:
    """F_b^2 of one direction by the code that training uses."""
    sample = OuterGradients(grad_TO, input_TI)
    cross_KB = sample.cross_with(direction_OI[None])
    return (cross_KB**2).sum() / sample.squares().sum()
