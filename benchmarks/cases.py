"""All cases, the most telling first: those behind the project's goals, so that a short budget still shows them."""

from __future__ import annotations

from benchmarks import attention, experts, layers, routing
from benchmarks.registry import BOTH, Case, Where


def all_cases(where: Where) -> list[Case]:
    found = [*experts.cases(where), *layers.cases(where), *routing.cases(where), *attention.cases(where)]
    return sorted(found, key=_is_extra)


def _is_extra(case: Case) -> bool:
    """Whether no goal reads it: the experts forward at training sizes, and backward at DiffMoE's."""
    if case.op != "experts":
        return case.op in ("permute", "token-choice layer")
    return case.name == layers.DIFFMOE or (case.direction != BOTH and "sampling" not in case.name)
