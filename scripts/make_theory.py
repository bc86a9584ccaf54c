"""Write docs/theory.md, the papers' statements and what became of them, from the checks."""

from __future__ import annotations

import re
import sys
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from tests.theory.registry import CORRECTED, FALSE, PRINTED, Statement  # noqa: E402
from tests.theory.statements import STATEMENTS  # noqa: E402

PAGE = ROOT / "docs" / "theory.md"
PAPERS = {"OPO": "arXiv 2601.12415", "ISOPO": "arXiv 2512.23353"}

INTRODUCTION = """\
# Theory

Made by `make reference` from `tests/theory`. The folder `tests/theory/maths` holds the mathematics
of both papers as exact functions of small categorical policies: expectations are sums over the
outcomes, Fisher matrices are enumerated. It is for checking and for teaching; the installed package
does not have it. The [paper index](papers.md) has the same statements in the papers' order, each
with its code. From the root of a checkout:

```pycon
>>> import torch
>>> from tests.theory.maths import escort, opo, simplex
>>> anchor_V = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
>>> advantage_V = torch.tensor([-2.0, 0.0, 1.0], dtype=torch.float64)
>>> weight_V = escort.escort_weight(anchor_V, escort.oracle(advantage_V), alpha=0.4)
>>> opo.closed_form(weight_V, anchor_V, mu=0.5)  # below -1: no policy
tensor([-1.4937,  0.2840,  3.3081], dtype=torch.float64)
>>> simplex.constrained_optimum(weight_V, anchor_V, mu=0.5)  # the optimum among policies
tensor([-1.0000, -0.2096,  2.8144], dtype=torch.float64)

```

| module of `tests.theory.maths` | |
|---|---|
| `categorical` | expectations, ratio coordinates, chi-square, total variation, KL |
| `escort` | the oracle, the escort family, its weight and normalizer |
| `opo` | the objective, the closed form, its three derivations |
| `descent`, `trust_region` | gradient descent in v and its rate; the trust region and its mu |
| `surrogate` | the log-ratio surrogate, its error and its optimum |
| `simplex` | when the update is a policy, and the optimum among policies |
| `fisher` | scores, the Fisher matrix, the policy gradient and the natural one |
| `estimates` | ISOPO's estimates of the Fisher norm |
| `isopo` | ISOPO's scalings of a sequence, and the interacting rule |

In OPO's formulas E is the expectation under the anchor pi_k, t = pi / pi_k, v = t - 1,
Delta = log t, omega the escort weight and |v| the norm of L2(pi_k). In ISOPO's v is a direction of
the parameters, F the Fisher matrix and |v|_F the length in its metric.

## Where the papers are inconsistent, and what proxstep does

**OPO**

- *Centering.* Theorem 4.3 subtracts the mean; proposition A.2, algorithm 1 and the descent of
  section 8.2 do not. Without it the target omega / mu belongs to no policy, eq. 20 is off by eta
  in every step, and the log-ratio surrogate gains a term KL(pi_k, pi), which acts like mu + 1
  in place of mu to first order. `drive: center` (omega - 1) is the default; `none` is algorithm 1
  as printed.
- *Positivity.* Proposition 8.4's condition bounds v* from the wrong side. The true one is
  mu + min omega >= 1, which mu >= 1 always satisfies; both are logged. Projecting the update
  onto the simplex (`simplex.project`) is the exact optimum under v >= -1.
- *alpha near 1.* Remark 6.2 has omega become A; by definition 4.1 it becomes 1 and the update 0.
  To first order in 1 - alpha the update is the centered advantage, not divided by its standard
  deviation. proxstep z-scores only where asked to (`drive: zscore`), and normalizes omega to mean
  1, which section 4.1's z-scoring does not.
- *The anchor's probability.* Eq. 7 divides by pi_k^(1 - alpha), appendix A.3 drops it. Both are
  right, for the oracles e^A and pi_k e^A; the second is the default (`anchor_correction:
  absorbed`).
- *The surrogate.* Lemma A.1's bounds hold, for every delta; its conclusion does not. The losses
  differ at second order, by E[drive Delta^2] / 2, and only eq. 10 has constant curvature.
  `surrogate: ratio` is eq. 10.
- *mu* is twice the multiplier of the printed trust region, and it does change the target: its
  length.
- *Saturation.* The linear gradient of section 8.3 is the one with respect to v. With respect to a
  logit the exact objective saturates like the others.

**ISOPO**

- *Units.* Eq. 1's v.F v is the squared metric and the chi-square to leading order; the KL
  divergence is half of it.
- *The estimate.* Eq. 3 does not estimate v.F v but v.F v / trace F, which has no scale of its own
  and is at most |v|^2. proxstep follows eq. 3; `scale: preserved` removes the unit that is left.
- *Position-wise gradients* are uncorrelated only if each position moves its own token alone;
  `experiments/exact_fisher.py` and the [diagnostics](diagnostics.md) measure the difference.
- *The code of figures 2 and 3* does not run as printed; proxstep computes its formulas.

"""


def theory_page() -> str:
    """Return the page of the statements."""
    count = Counter(statement.holds for statement in STATEMENTS)
    verdicts = ", ".join(f"{count[holds]} {holds}" for holds in (PRINTED, CORRECTED, FALSE))
    lines = [
        "## The statements",
        "",
        f"{len(STATEMENTS)} statements: {verdicts}.",
        "Each is checked on random instances by the test `test_statement` of its name in",
        "`tests/theory/test_statements.py`. Each check fails when a formula that it is about is",
        "changed. Where a statement is wrong the check shows what the remark says.",
    ]
    for paper, source in PAPERS.items():
        lines += ["", f"### {paper} ({source})", ""]
        lines += ["| number | what it says | holds | remark | test |", "|---|---|---|---|---|"]
        lines += [_row(statement) for statement in STATEMENTS if statement.paper == paper]
    return INTRODUCTION + "\n".join(lines) + "\n"


def _row(statement: Statement) -> str:
    cells = [statement.number, statement.says, statement.holds, statement.remark]
    escaped = [re.sub(r"([|*])", r"\\\1", cell).replace("<", "&lt;") for cell in cells]
    return "| " + " | ".join([*escaped, f"`{statement.test_id}`"]) + " |"


def main() -> None:
    """Write the page."""
    PAGE.write_text(theory_page(), encoding="utf-8")


if __name__ == "__main__":
    main()
