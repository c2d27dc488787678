"""The C pump against its model in plain Python, under random schedules over real pipes.

RELAY_EXAMPLES sets the number of random schedules (default 120); the sanitized run takes fewer.
"""

from __future__ import annotations

import random
from typing import Any

import pytest
from descriptors import Descriptors
from hypothesis import given
from hypothesis import strategies as st
from rig import Rig
from schedules import (
    EXAMPLES,
    PIECES,
    SCATTERS,
    SEEDED,
    SLOTS,
    SPECS,
    STEPS,
    act,
    check,
    drawn,
    finish,
    play,
    readable_spec,
    sane,
)
from twins import Scatter, Spec


@SEEDED
@given(
    specs=st.lists(SPECS, min_size=1, max_size=4),
    steps=STEPS,
    source_slots=SLOTS,
    copy_source=st.booleans(),
    pipes=st.booleans(),
    budget=st.sampled_from([1, 5000, 1 << 22]),
    seed=st.integers(0, 2**32),
    scatter=SCATTERS,
)
def test_every_schedule_ends_as_the_model_says(
    specs: list[Spec],
    steps: list[tuple[tuple[str, Any, int], bool]],
    source_slots: int,
    copy_source: bool,
    pipes: bool,
    budget: int,
    seed: int,
    scatter: Scatter | None,
) -> None:
    """In whatever order things happen, each sweep does what the model does, and every byte arrives."""
    with Descriptors() as fds:
        rig = Rig(
            fds,
            [sane(spec, tail=number == len(specs)) for number, spec in enumerate(specs, 1)],
            seed=seed,
            source_slots=source_slots,
            copy_source=copy_source,
            pipes=pipes,
            budget=budget,
            scatter=scatter,
        )
        play(rig, steps)


@SEEDED
@given(
    specs=st.lists(SPECS, min_size=1, max_size=4),
    steps=STEPS,
    scatter=SCATTERS.filter(bool),
    begins=st.booleans(),
    budget=st.sampled_from([1, 5000, 1 << 22]),
    seed=st.integers(0, 2**32),
)
def test_every_schedule_ends_as_the_model_says_through_a_ring(
    specs: list[Spec],
    steps: list[tuple[tuple[str, Any, int], bool]],
    scatter: Scatter,
    begins: bool,
    budget: int,
    seed: int,
) -> None:
    """Plain sinks read a ring as they are fed by a chain, whenever the bytes change from one way to the other."""
    with Descriptors() as fds:
        plain = [readable_spec(spec, tail=number == len(specs)) for number, spec in enumerate(specs, 1)]
        rig = Rig(fds, plain, seed=seed, budget=budget, scatter=scatter, pipes=bool(seed % 2))
        if begins:
            rig.change()
            rig.sweep()
            assert rig.changes == 1
        play(rig, steps)


@pytest.mark.parametrize("seed", range(max(10, EXAMPLES // 2)))
def test_long_schedules_that_change_their_way(fds: Descriptors, seed: int) -> None:
    """Over many changes between chain and ring, with slow, dying and new sinks, nothing is lost and all is counted."""
    chance = random.Random(seed)
    scatter = Scatter(
        full=chance.choice([24000, 60_000, 300_000]),
        reserve=4096,
        batch=chance.choice([0, 10_000, 60_000]),
        hold=chance.choice([1, 10**6, 10**9]),
        quick=chance.choice([1, 10_000]),
        least=chance.choice([1, 30_000]),
    )
    specs = [readable_spec(drawn(chance), tail=False) for _ in range(chance.randrange(4))]
    specs.append(readable_spec(drawn(chance), tail=True))
    budget = chance.choice([5000, 1 << 22])
    rig = Rig(fds, specs, seed=seed, scatter=scatter, budget=budget, pipes=bool(seed % 2))
    greedy = chance.random() < 0.7
    for _ in range(150):
        what = chance.random()
        if what < 0.4:
            act(rig, "feed", chance.randrange(1, 60_000), chance.choice(PIECES))
        elif what < 0.8 or greedy:
            act(rig, "read", chance.randrange(len(rig.outlets)), chance.choice([1, 4096, 50_000, 1 << 20]))
        elif what < 0.83:
            act(rig, "later", chance.choice([1000, 10**7, 10**9]), 0)
        elif what < 0.84:
            act(rig, "kill", chance.randrange(len(rig.outlets)), 0)
        elif what < 0.88:
            act(rig, "again", chance.randrange(len(rig.outlets)), 0)
        if chance.random() < 0.05:
            act(rig, chance.choice(["change", "change", "stay"]), 0, 0)
        if chance.random() < 0.7:
            rig.sweep()
    finish(rig)
    for outlet in rig.outlets:
        check(rig, outlet)
