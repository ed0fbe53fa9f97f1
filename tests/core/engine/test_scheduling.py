"""Scheduler and blocks under random operations, over a runner that keeps tokens where keys and values would be.

The runner knows nothing but the plans. It writes each token into its slot, reads every row back through its table, and
answers with a token that depends on all it read: a block shared too early, freed too early, copied too late or found under
another text changes an answer.
"""

from __future__ import annotations

import zlib
from dataclasses import replace

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from research.core.engine.api import EngineRequest
from research.core.engine.batch import StepPlan
from research.core.engine.runner import StepOutput
from research.core.torch.decoder import Decoder
from tests.core.engine.small_engine import SPEC, Answer, engine, nothing_leaked

VOCAB = 61
with torch.device("meta"):
    DECODER = Decoder(replace(SPEC, vocab=VOCAB))


def next_token(text: list[int], adapter: int = 0) -> int:
    return zlib.crc32(bytes(text) + bytes([adapter])) % VOCAB


def expected(prompt, new: int) -> list[int]:
    text = list(prompt)
    for _ in range(new):
        text.append(next_token(text))
    return text[len(prompt) :]


class TokenRunner:
    """See the module's description."""

    def __init__(self, blocks: int, block_size: int, max_tokens: int, max_batch: int):
        self.num_blocks, self.size = blocks, block_size
        self.max_tokens, self.max_batch = max_tokens, max_batch
        self.slots: list[int | None] = [None] * (blocks * block_size)

    def execute(self, plan: StepPlan) -> StepOutput:
        assert 0 < len(plan.tokens) <= self.max_tokens and len(plan.queries) <= self.max_batch
        for old, new in plan.copies:
            self.slots[new * self.size : (new + 1) * self.size] = self.slots[old * self.size : (old + 1) * self.size]
        places = [
            [table[at // self.size] * self.size + at % self.size for at in range(context)]
            for table, context in zip(plan.tables, plan.contexts)
        ]
        begin, written = 0, set()
        for slots, queries in zip(places, plan.queries):
            for slot, token in zip(slots[len(slots) - queries :], plan.tokens[begin:]):
                assert slot not in written, "two rows write to one slot"
                written.add(slot)
                self.slots[slot] = token
            begin += queries
        logits = torch.zeros(len(plan.sampled), VOCAB)
        for place, row in enumerate(plan.sampled):
            logits[place, next_token([self.slots[slot] for slot in places[row]])] = 1
        return StepOutput(logits)


# Prompts that open alike, in steps that are no multiples of a block, and some that do not.
PROMPTS = [[1 + seed] * opening + list(range(rest)) for seed in (0, 1) for opening in (0, 9, 24) for rest in (1, 6, 17)]
OPERATIONS = st.lists(
    st.one_of(
        st.tuples(
            st.just("add"),
            st.sampled_from(PROMPTS),
            st.integers(0, 12),  # new tokens
            st.integers(1, 3),  # answers
            st.integers(0, 2),  # priority
        ),
        st.tuples(st.just("cancel"), st.integers(0, 30)),
        st.tuples(st.just("step"), st.integers(1, 6)),
    ),
    max_size=25,
)


@settings(max_examples=250, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(
    operations=OPERATIONS,
    blocks=st.integers(14, 40),
    block_size=st.sampled_from([4, 8]),
    max_tokens=st.sampled_from([3, 8, 64]),
    max_batch=st.sampled_from([3, 8]),
    prefix_cache=st.booleans(),
    collide=st.booleans(),
)
def test_whatever_comes_every_answer_is_right_and_no_block_is_lost(
    operations, blocks, block_size, max_tokens, max_batch, prefix_cache, collide
):
    runner = TokenRunner(blocks, block_size, max_tokens, max_batch)
    running = engine(
        DECODER,
        runner=runner,
        block_size=block_size,
        max_tokens_per_step=max_tokens,
        max_batch=max_batch,
        prefix_cache=prefix_cache,
    )
    if collide:
        running.pool._hasher = lambda before, tokens: len(tokens)  # every block has the same hash
    wanted, cancelled, answers = {}, set(), {}

    def step():
        for update in running.step():
            answers.setdefault((update.request, update.choice), Answer()).add(update)

    for operation in operations:
        if operation[0] == "add":
            _, prompt, new, choices, priority = operation
            number = running.submit(EngineRequest(tuple(prompt), max_new_tokens=new, n=choices, priority=priority))
            wanted[number] = prompt, new, choices
        elif operation[0] == "cancel":
            if operation[1] in wanted:
                cancelled.add(operation[1])
            running.cancel(operation[1])
        else:
            for _ in range(operation[1]):
                step()
    while running.has_work():
        step()
    assert len(answers) == sum(choices for _, _, choices in wanted.values())
    for (number, _), answer in answers.items():
        prompt, new, _ = wanted[number]
        whole = expected(prompt, new)
        if answer.last.finish == "cancelled":
            assert number in cancelled and answer.tokens == whole[: len(answer.tokens)]
        else:
            assert answer.last.finish == "length" and answer.tokens == whole
    assert nothing_leaked(running)
    assert running.stats().cached_blocks <= blocks * prefix_cache
