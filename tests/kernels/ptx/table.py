"""Which function does which instruction."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from tests.kernels.ptx.parse import Instruction

if TYPE_CHECKING:
    from tests.kernels.ptx.machine import Machine

Active = np.ndarray | None  # which threads do it; None: all
Action = Callable[["Machine", Instruction, Active], None]
ACTIONS: list[tuple[re.Pattern, Action]] = []


def does(pattern: str) -> Callable[[Action], Action]:
    """Of the instructions whose whole name matches."""

    def register(action: Action) -> Action:
        ACTIONS.append((re.compile(pattern), action))
        return action

    return register


def computes(pattern: str):
    """As `does`, of a function that returns what the first operand becomes."""

    def register(function: Callable[[Machine, Instruction], np.ndarray]):
        does(pattern)(lambda machine, ins, active: machine.write(ins.operands[0], function(machine, ins), active))
        return function

    return register


@functools.cache
def find(name: str) -> Action | None:
    return next((action for pattern, action in ACTIONS if pattern.fullmatch(name)), None)
