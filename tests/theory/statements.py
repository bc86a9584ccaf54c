"""Every numbered statement of both papers that can be checked, by topic.

OPO is arXiv 2601.12415, ISOPO arXiv 2512.23353. Figures that only show experiments are left out.
"""

from __future__ import annotations

from tests.theory import (
    isopo_fisher,
    isopo_rules,
    opo_analysis,
    opo_geometry,
    opo_positivity,
    opo_response,
)
from tests.theory.registry import Statement

STATEMENTS = [
    value
    for module in (
        opo_geometry,
        opo_response,
        opo_analysis,
        opo_positivity,
        isopo_fisher,
        isopo_rules,
    )
    for value in vars(module).values()
    if isinstance(value, Statement)
]
