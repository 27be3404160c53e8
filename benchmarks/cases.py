"""All cases, and their pairs with providers in parts: what the goals' verdicts need, what they compare with, extras."""

from __future__ import annotations

from benchmarks import adaln, attention, expert_choice, experts, grouped_gemm, routing, token_choice, whole_models
from benchmarks.goals import GOALS, Key
from benchmarks.parts import PARTS
from benchmarks.registry import Case, Where

OWN_PARTS = {"experts": "experts", "rope_attention": "attention"}  # of the ops' verdicts


def all_cases(where: Where) -> list[Case]:
    kinds = experts, grouped_gemm, token_choice, expert_choice, routing, attention, adaln, whole_models
    return [case for kind in kinds for case in kind.cases(where)]


def pairs(where: Where) -> list[tuple[str, Case, str]]:
    """Part, case and provider of each pair; within a part in the order of the goals."""
    found = {(*case.key, provider): case for case in all_cases(where) for provider in case.providers}
    decisive = [key for goal in GOALS for key in goal.decisive]
    shown = [key for goal in GOALS for key in goal.shown]

    def part(key: Key) -> str:
        if key[0] in whole_models.BATCHES:
            return "models" if key in shown else "other-models"
        if key in decisive:
            return OWN_PARTS.get(key[0], "layers")
        return "compared" if key in shown else "extras"

    order = dict.fromkeys([*decisive, *shown, *found])
    return sorted(
        ((part(key), found[key], key[3]) for key in order if key in found), key=lambda one: PARTS.index(one[0])
    )
