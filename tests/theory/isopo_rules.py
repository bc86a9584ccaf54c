"""ISOPO, sections 2.0.1, 2.0.3 and 3: the two rules, and the code in the figures."""

from __future__ import annotations

import torch
from torch import Tensor

from proxstep.isopo import PRESETS, IsometricRule, NaturalRule
from proxstep.isopo.plan import Statistics
from proxstep.isopo.rule import GUARD
from tests.theory.cases import Model, close, random
from tests.theory.isopo_fisher import FISHER, NORMS, OVERLAPS, linear_layer
from tests.theory.maths import estimates, fisher, isopo
from tests.theory.registry import CORRECTED, FALSE, states

SCALE = ("maths.isopo.isometric_scale", ".rsqrt()", ".reciprocal()")
UNDAMPED = ("maths.isopo.isometric_scale", "+ regularization", "+ 0 * regularization")
WEIGHTS = (
    "isopo.rule.IsometricRule.weigh",
    "scale_B = scale_B * self._damped_square",
    "scale_B = scale_B / self._damped_square",
)
CLOSEST = (
    "maths.isopo.closest_scale",
    "direction_P @ gradient_P /",
    "gradient_P @ gradient_P /",
)
DISTANCE = ("maths.isopo.distance_to_natural", "direction_P - torch", "direction_P + torch")
MINSR = ("maths.isopo.minsr", "+ damping *", "+ 2 * damping *")
KERNEL = (
    "isopo.rule.NaturalRule.weigh",
    "eigenvalue_B.clamp(min=0) + damping",
    "eigenvalue_B.clamp(min=0) + 2 * damping",
)


def sample(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Scores of six sampled outcomes (6, 4), their F_b^2 and |G_b|^2, and advantages."""
    model = Model(seed)
    score_BP = model.score_VP[torch.arange(6)]
    fisher_sq_B = torch.stack([s @ model.fisher_PP @ s for s in score_BP])
    return score_BP, fisher_sq_B, score_BP.square().sum(1), random(seed + 50, 6)


@states(
    "ISOPO",
    "section 2.0.1",
    "Scaled by lambda <= C / |v|_F a sequence's step has a divergence of at most C^2; with reg in "
    "the root the scaling acts like a clip.",
    SCALE,
    UNDAMPED,
    WEIGHTS,
    ("maths.fisher.fisher_square", ".square()", ".abs()"),
    remark="Of the chi-square, to leading order; the KL divergence is at most C^2 / 2. The clip is "
    "soft, within a factor sqrt(2) of min(1, |v|_F / sqrt(reg)). The bound is per layer and before "
    "the advantage: L layers that move together can have L^2 times the divergence.",
)
def bounded_share(seed: int) -> None:
    model = Model(seed)
    score_BP, fisher_sq_B, _, advantage_B = sample(seed)
    context = (model.score_VP, model.prob_V)
    for v, scale in zip(score_BP, isopo.isometric_scale(fisher_sq_B, 0.0), strict=True):
        close(fisher.fisher_square(0.3 * scale * v, *context), 0.3**2)
        doubled = (torch.cat([scale * v, scale * v]), model.score_VP.repeat(1, 2), model.prob_V)
        close(fisher.fisher_square(*doubled), 4.0)
    for reg in (0.1, 10.0):
        scale_B = isopo.isometric_scale(fisher_sq_B, reg)
        length_B = fisher_sq_B.sqrt() * scale_B
        clipped_B = (fisher_sq_B / reg).sqrt().clamp(max=1)
        assert (length_B <= clipped_B).all()
        assert (length_B >= clipped_B / 2**0.5 - 1e-12).all()
        rule = IsometricRule(-1.0, damping=1.0)
        past = {"fisher_sq": torch.tensor(reg - GUARD, dtype=torch.float64)}
        weight_B = rule.weigh(Statistics(advantage_B, fisher_sq_B), past)[0]
        close(weight_B, advantage_B * scale_B)


@states(
    "ISOPO",
    "figure 2",
    "The code of the non-interacting rule adds up A_b G_b / sqrt(F_b^2 + reg).",
    SCALE,
    OVERLAPS,
    NORMS,
    WEIGHTS,
    holds=FALSE,
    remark="F_norm is eq. 6. But `rescaling` returns the factor without the gradient, so the sum "
    "is a number; `microbatch_grad_out` and `g_out` are not defined (the argument is "
    "`batch_grad_out`), nor is `act_in` where it is first read.",
)
def figure_2(seed: int) -> None:
    _, grad_TO, input_TI = linear_layer(seed)
    bounds, advantage_B, reg = ((0, 2), (2, 6)), random(seed + 7, 2), 0.4
    gradients = [grad_TO[s:e].mT @ input_TI[s:e] for s, e in bounds]
    drawn = torch.tensor([0, 3, 5])
    norm_B = torch.stack(
        [estimates.linear_norm(whole, grad_TO[drawn], input_TI[drawn]) for whole in gradients]
    )
    for norm, whole in zip(norm_B, gradients, strict=True):
        overlap_K = torch.einsum("ko,oi,ki->k", grad_TO[drawn], whole, input_TI[drawn])
        length_K = grad_TO[drawn].norm(dim=1) * input_TI[drawn].norm(dim=1)
        close(norm, overlap_K.norm() / length_K.norm())
    scale_B = (norm_B**2 + reg) ** -0.5
    close(isopo.isometric_scale(norm_B**2, reg), scale_B)
    past = {"fisher_sq": torch.tensor(reg - GUARD, dtype=torch.float64)}
    rule = IsometricRule(-1.0, damping=1.0)
    weight_B = rule.weigh(Statistics(advantage_B, norm_B**2), past)[0]
    close(weight_B, advantage_B * scale_B)


@states(
    "ISOPO",
    "section 2.0.3, eq. 7",
    "Of all multiples of v, A |v|^2 / |v|_F^2 times v is the nearest to F^-1 g in the Fisher "
    "metric.",
    CLOSEST,
    DISTANCE,
    remark="For the sequence's own g = A v, as the text says; in general lambda is v.g / |v|_F^2. "
    "Each sequence is nearest to its own F^-1 g; of several, the combination nearest to the "
    "batch's natural gradient solves V F V^T lambda = V g and is another.",
)
def closest_multiple(seed: int) -> None:
    model = Model(seed)
    v, fisher_PP = model.score_VP[0], model.fisher_PP
    advantage = model.advantage_V[0]
    for gradient_P in (advantage * v, model.direction_P):
        best = isopo.closest_scale(v, gradient_P, fisher_PP)
        for off in (0.5, -2.0):
            at = isopo.distance_to_natural(best + off, v, gradient_P, fisher_PP)
            least = isopo.distance_to_natural(best, v, gradient_P, fisher_PP)
            close(at - least, off**2 * v @ fisher_PP @ v, rtol=1e-7)
            close(
                least + best**2 * (v @ fisher_PP @ v), gradient_P @ fisher_PP.inverse() @ gradient_P
            )
    own = isopo.closest_scale(v, advantage * v, fisher_PP)
    close(own, advantage * (v @ v) / (v @ fisher_PP @ v))
    rows_BP, few_B = model.score_VP[:2], model.advantage_V[:2]
    gradient_P = few_B @ rows_BP
    gram_BB = rows_BP @ fisher_PP @ rows_BP.mT
    together_B = torch.linalg.solve(gram_BB, rows_BP @ gradient_P)
    alone_B = few_B * rows_BP.square().sum(1) / gram_BB.diagonal()

    def distance(scale_B: Tensor) -> Tensor:
        one = torch.ones((), dtype=torch.float64)
        return isopo.distance_to_natural(one, scale_B @ rows_BP, gradient_P, fisher_PP)

    assert distance(together_B) < distance(alone_B)


@states(
    "ISOPO",
    "section 2.0.3, update",
    "The update is the sum of A (|v|_F^2 / |v|^2 + reg)^-1 v, linear in the gradient's scale.",
    WEIGHTS,
    CLOSEST,
    FISHER,
    remark="Figure 3 with r = -2. With eq. 3 in place of |v|_F the ratio lies in [0, 1].",
)
def relative_update(seed: int) -> None:
    model = Model(seed)
    score_BP, _, norm_sq_B, advantage_B = sample(seed)
    fisher_PP = fisher.fisher_matrix(model.score_VP, model.prob_V)
    fisher_sq_B = ((score_BP @ fisher_PP) * score_BP).sum(1)
    found = Statistics(advantage_B, fisher_sq_B, norm_sq_B)
    mean = (fisher_sq_B / norm_sq_B).mean()
    damped = IsometricRule(0.0, 0.0, -2.0, damping=0.5)
    weight_B = damped.weigh(found, {})[0]
    close(weight_B, advantage_B / (fisher_sq_B / norm_sq_B + 0.5 * mean + GUARD))
    plain_B = PRESETS["isopo-npg"].weigh(found, {})[0]
    pairs = zip(score_BP, advantage_B, strict=True)
    closest = [isopo.closest_scale(v, a * v, model.fisher_PP) for v, a in pairs]
    close(plain_B, torch.stack(closest), rtol=1e-3)


@states(
    "ISOPO",
    "figure 3",
    "The general scaling is reg2(F)^p reg2(|G|)^q reg2(F / |G|)^r.",
    WEIGHTS,
    (
        "isopo.rule.IsometricRule._damped_square",
        "return square + self.damping * mean + GUARD",
        "return square + mean + GUARD",
    ),
    holds=CORRECTED,
    remark="The formula; the code raises, since `reg2` has an argument named `reg` that hides the "
    "function `reg` it calls. All powers 0 is REINFORCE. Undamped r = -2 is p = -2 with q = 2.",
)
def figure_3(seed: int) -> None:
    _, fisher_sq_B, norm_sq_B, advantage_B = sample(seed)
    found, damping = Statistics(advantage_B, fisher_sq_B, norm_sq_B), 0.3

    def reg2(x_B: Tensor) -> Tensor:
        return (x_B**2 + damping * (x_B**2).mean() + 1e-8).sqrt()

    norm_B, length_B = fisher_sq_B.sqrt(), norm_sq_B.sqrt()
    for p, q, r in ((-1, 0, 0), (0, 0, -2), (0, -1, -2), (-0.5, 1, 2)):
        rule = IsometricRule(float(p), float(q), float(r), damping=damping)
        expected_B = reg2(norm_B) ** p * reg2(length_B) ** q * reg2(norm_B / length_B) ** r
        close(rule.weigh(found, {})[0], advantage_B * expected_B)
    close(PRESETS["reinforce"].weigh(found, {})[0], advantage_B)
    powers = (IsometricRule(0.0, 0.0, -2.0), IsometricRule(-2.0, 2.0, 0.0))
    same = [rule.weigh(found, {})[0] for rule in powers]
    close(*same, rtol=1e-3)


@states(
    "ISOPO",
    "figure 5",
    "Normalizing by Euclidean length is q = -1 (the caption ends with q = 1).",
    WEIGHTS,
    holds=CORRECTED,
    remark="q = -1 makes all sequences equally long; q = 1 squares the lengths. The last sentence "
    "of the caption lacks the sign.",
)
def figure_5(seed: int) -> None:
    _, fisher_sq_B, norm_sq_B, advantage_B = sample(seed)
    found = Statistics(torch.ones_like(advantage_B), fisher_sq_B, norm_sq_B)
    lengths = {
        q: IsometricRule(0.0, q, 0.0).weigh(found, {})[0] * norm_sq_B.sqrt() for q in (-1.0, 1.0)
    }
    close(lengths[-1.0], torch.ones_like(norm_sq_B), rtol=1e-3)
    close(lengths[1.0], norm_sq_B, rtol=1e-3)
    assert PRESETS["isopo-euclidean"] == IsometricRule(0.0, -1.0, 0.0)


@states(
    "ISOPO",
    "section 3",
    "J^T (K + c I)^-1 A maximizes, in the span of the sampled gradients, the overlap with J^T A / "
    "n less penalties on the Fisher metric |J v|^2 / n and on |v|^2.",
    MINSR,
    ("maths.isopo.damped_overlap", "penalty / 2", "penalty"),
    ("maths.fisher.natural_gradient", "0.0) + damping", "0.0)"),
    remark="With the factors 1 / 2 and c / (2 n), which the text leaves open; among all v too. It "
    "is the natural gradient with the sample's Fisher matrix and damping c / n. For c to 0 and K "
    "regular it changes every log-probability in proportion to its advantage: J v = A. Unlike "
    "MinSR, J is not centered. The index i of J stands for the layer and for the sequence.",
)
def interacting_rule(seed: int) -> None:
    model = Model(seed)
    score_BP, _, _, advantage_B = sample(seed)
    damping, count, identity = 0.7, len(score_BP), torch.eye(4, dtype=torch.float64)
    update_P = isopo.minsr(score_BP, advantage_B, damping)
    normal_PP = score_BP.mT @ score_BP + damping * identity
    close(update_P, torch.linalg.solve(normal_PP, score_BP.mT @ advantage_B))
    uniform_B = torch.full((count,), 1 / count, dtype=torch.float64)
    context = (score_BP, uniform_B, advantage_B)
    close(update_P, fisher.natural_gradient(*context, damping / count))
    for number in range(3):
        off_P = random(seed + number, 4)
        values = [
            isopo.damped_overlap(v, score_BP, advantage_B, damping)
            for v in (update_P, update_P + off_P)
        ]
        close(values[0] - values[1], off_P @ normal_PP @ off_P / (2 * count))
    root_V = model.prob_V.sqrt()
    whole_P = isopo.minsr(root_V[:, None] * model.score_VP, root_V * model.advantage_V, damping)
    exact_P = fisher.natural_gradient(model.score_VP, model.prob_V, model.advantage_V, damping)
    close(whole_P, exact_P)
    few_BP = score_BP[:3]
    small = 1e-6 * torch.linalg.eigvalsh(few_BP @ few_BP.mT)[0].item()
    close(few_BP @ isopo.minsr(few_BP, advantage_B[:3], small), advantage_B[:3], atol=1e-4)


@states(
    "ISOPO",
    "figure 6",
    "The code solves (K + c I) x = A by eigendecomposition and adds up J^T x.",
    MINSR,
    KERNEL,
)
def figure_6(seed: int) -> None:
    score_BP, _, _, advantage_B = sample(seed)
    kernel_BB = score_BP @ score_BP.mT
    past = {"eigenvalue": torch.tensor(0.9, dtype=torch.float64)}
    found = Statistics(advantage_B, ntk_BB=kernel_BB)
    weight_B, _, _ = NaturalRule(ntk_damping=0.5).weigh(found, past)
    update_P = isopo.minsr(score_BP, advantage_B, 0.45)
    close(score_BP.mT @ weight_B, update_P)
    identity = torch.eye(6, dtype=torch.float64)
    close((kernel_BB + 0.45 * identity) @ weight_B, advantage_B)


@states(
    "ISOPO",
    "figure 7",
    "The regularization is the mean eigenvalue of K, averaged over minibatches.",
    ("isopo.rule.NaturalRule.weigh", "ntk_BB.diagonal().clone()", "ntk_BB.mean(dim=0)"),
    KERNEL,
    remark="The mean eigenvalue is the mean of |G_b|^2; for K = k I the weights are A / (2 k).",
)
def figure_7(seed: int) -> None:
    score_BP, _, norm_sq_B, advantage_B = sample(seed)
    kernel_BB = score_BP @ score_BP.mT
    _, moments, _ = NaturalRule().weigh(Statistics(advantage_B, ntk_BB=kernel_BB), {})
    close(moments["eigenvalue"].mean(), torch.linalg.eigvalsh(kernel_BB).mean())
    close(moments["eigenvalue"].mean(), norm_sq_B.mean())
    flat_BB = 3 * torch.eye(6, dtype=torch.float64)
    weight_B, _, _ = NaturalRule().weigh(Statistics(advantage_B, ntk_BB=flat_BB), {})
    close(weight_B, advantage_B / 6)
