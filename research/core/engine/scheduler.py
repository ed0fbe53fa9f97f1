"""Which tokens go into the next forward: continuous batching with chunked prefill under a token budget.

Order: answers that decode, then prompts under way, then new ones; in each by priority, then age. A decoding answer that
finds no free block makes the last in that order give up its blocks (preemption); what was computed is computed again
later, mostly from the prefix cache.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass, field

from research.core.engine.answer import Answer
from research.core.engine.batch import StepPlan
from research.core.engine.blocks import BlockPool


@dataclass
class Step:
    """A plan and whose it is: ``sampled`` has the answers that want a token, each with its row of the logits;
    ``embedded`` the texts whose rows of hidden states are wanted, in order; ``scored`` the answers whose prompt's
    log-probabilities are, in order, each with its row and the first place of the prompt in it."""

    plan: StepPlan
    sampled: list[tuple[Answer, int]]
    embedded: list[Answer]
    scored: list[tuple[Answer, int, int]] = field(default_factory=list)


class Scheduler:
    """Waiting and running answers over a pool of blocks. Knows no tensors."""

    def __init__(
        self, pool: BlockPool, max_batch: int, max_tokens: int, dynamic_ntk: bool = False, causal: bool = True
    ):
        self.pool, self.max_batch, self.max_tokens = pool, max_batch, max_tokens
        self.dynamic_ntk, self.causal = dynamic_ntk, causal
        self.running: list[Answer] = []  # by key
        self._waiting: list[tuple[tuple[int, int, int], Answer]] = []  # a heap
        self._gone: set[tuple[int, int, int]] = set()  # keys in the heap of answers that were cancelled
        self._rows = 0  # of the running answers, with the siblings to come
        self._stuck: tuple[Answer, int] | None = None  # who did not fit last time, and the free blocks then
        self.preemptions = 0

    @property
    def waiting(self) -> int:
        return len(self._waiting) - len(self._gone)

    def add(self, answer: Answer) -> None:
        heapq.heappush(self._waiting, (answer.key, answer))

    def remove(self, answer: Answer) -> None:
        """An answer has ended or was cancelled, wherever it is; its blocks are given back."""
        if answer.running:
            self.running.remove(answer)
            self._release(answer)
        else:
            self._gone.add(answer.key)

    def start_over(self) -> None:
        """A step has failed: nothing that was computed can be trusted, and what runs waits for its turn again."""
        for answer in list(self.running):
            self.preempt(answer)
        self.pool.forget()
        self._stuck = None

    def plan(self) -> Step | None:
        """The next step, with all blocks taken; None when there is nothing to do."""
        if not self.causal:
            return self._plan_whole()
        self._yield_to_priority()
        step = Step(StepPlan([], [], [], [], []), [], [])
        left = self._plan_decoding(step, self.max_tokens)
        self._plan_prompts(step, left)
        for answer, row, begin in step.scored:
            step.plan.scored.append(row)
            end = min(begin + step.plan.queries[row] + 1, answer.prompt_length)
            step.plan.targets.append(answer.tokens[begin + 1 : end])
            step.plan.best = max(step.plan.best, answer.scored)
        return step if step.plan.tokens else None

    # --- the three kinds of rows -------------------------------------------------------------------------------

    def _plan_decoding(self, step: Step, left: int) -> int:
        place = 0
        while place < len(self.running) and left:
            answer = self.running[place]
            if answer.missing == 1 and answer.computed:
                if not self._writable(answer, step.plan):
                    continue  # somebody was preempted, perhaps this one
                self._put(step, answer, 1)
                left -= 1
            place += 1
        return left

    def _plan_prompts(self, step: Step, left: int) -> None:
        """Prompts under way, then new ones. While several want tokens, one gets at most half of a step."""
        prompts = [a for a in self.running if a.missing > 1 or not a.computed]
        half = max(1, self.max_tokens // 2)
        later: list[Answer] = []
        while left:
            answer = prompts.pop(0) if prompts else self._admit()
            if answer is None:
                break
            take = min(answer.missing, left)
            if take > half and (prompts or self._waiting):
                take = half
                later.append(answer)
            before = len(step.plan.tokens)
            self._put(step, answer, take)
            left -= len(step.plan.tokens) - before
        if left and later:  # nobody else wanted the rest
            answer = later[0]
            take = min(answer.missing, left)
            self._put_more(step, answer, take)

    def _admit(self) -> Answer | None:
        """Move the first waiting answer to the running ones, with blocks for all its tokens; None if it does not fit."""
        answer = self._first_waiting()
        if answer is None or self._rows + answer.rows > self.max_batch:
            return None
        if self._stuck is not None and self._stuck[0] is answer and self._stuck[1] >= self.pool.free:
            return None
        blocks, chain = self.pool.find(answer.root, answer.tokens)
        fresh = -(-len(answer.tokens) // self.pool.block_size) - len(blocks)
        # A hundredth is left for those that decode: who is admitted should not be preempted at once.
        reserve = self.pool.blocks // 100 if self.running else 0
        if fresh + reserve > self.pool.free:
            self.pool.give_back(blocks)
            self._stuck = (answer, self.pool.free)
            return None
        heapq.heappop(self._waiting)
        answer.computed, answer.chain = len(blocks) * self.pool.block_size, chain
        answer.blocks = blocks + [self.pool.take() for _ in range(fresh)]
        if answer.cached_tokens is None:
            answer.cached_tokens = answer.computed
        self._start(answer)
        self._stuck = None
        return answer

    def _plan_whole(self) -> Step | None:
        """Texts of a model that sees both ways: whole, without cache, as many as the budget holds."""
        plan = StepPlan([], [], [], [], [], whole=True)
        step = Step(plan, [], [])
        while (answer := self._first_waiting()) is not None and len(plan.queries) < self.max_batch:
            if plan.tokens and len(plan.tokens) + len(answer.tokens) > self.max_tokens:
                break
            heapq.heappop(self._waiting)
            self._start(answer)
            answer.cached_tokens = 0
            plan.embedded.append(len(plan.queries))
            step.embedded.append(answer)
            plan.tokens += answer.tokens
            plan.queries.append(len(answer.tokens))
            plan.contexts.append(len(answer.tokens))
        return step if plan.tokens else None

    # --- rows ----------------------------------------------------------------------------------------------------

    def _put(self, step: Step, answer: Answer, count: int) -> None:
        """The next ``count`` tokens of ``answer`` become a row of ``step``."""
        plan = step.plan
        begin = answer.computed
        if count == 1:
            plan.tokens.append(answer.tokens[begin])
        else:
            plan.tokens += answer.tokens[begin : begin + count]
        plan.queries.append(count)
        plan.contexts.append(begin + count)
        plan.tables.append(answer.blocks)
        if answer.adapter or plan.adapters is not None:
            if plan.adapters is None:
                plan.adapters = [0] * (len(plan.queries) - 1)
            plan.adapters.append(answer.adapter)
        if self.dynamic_ntk:
            if plan.prompt_lengths is None:
                plan.prompt_lengths = []
            plan.prompt_lengths.append(answer.prompt_length)
        if answer.scored is not None and begin < answer.prompt_length - 1:
            step.scored.append((answer, len(plan.queries) - 1, begin))
        self._computed(answer, begin + count)
        if answer.missing == 0:
            self._want(step, answer, len(plan.queries) - 1)

    def _put_more(self, step: Step, answer: Answer, count: int) -> None:
        """More tokens for a row that is in ``step`` already and not at its end."""
        plan = step.plan
        row = next(row for row, table in enumerate(plan.tables) if table is answer.blocks)
        at, begin = sum(plan.queries[: row + 1]), answer.computed
        plan.tokens[at:at] = answer.tokens[begin : begin + count]
        plan.queries[row] += count
        plan.contexts[row] += count
        self._computed(answer, begin + count)
        if answer.missing == 0:
            self._want(step, answer, row)

    def _computed(self, answer: Answer, length: int) -> None:
        """Count tokens as computed. Blocks that this step fills can be shared within it: a layer stores all keys and
        values before anything is attended."""
        answer.computed = length
        size = self.pool.block_size
        if self.pool.prefix_cache:
            for place in range(answer.chain.length, length // size):
                if answer.chain.broken:
                    break
                block = answer.blocks[place]
                self.pool.remember(answer.chain, block, answer.tokens[place * size : (place + 1) * size])

    def _want(self, step: Step, answer: Answer, row: int) -> None:
        if answer.embed:
            step.plan.embedded.append(row)
            step.embedded.append(answer)
            return
        place = len(step.plan.sampled)
        step.plan.sampled.append(row)
        step.sampled.append((answer, place))
        for sibling in answer.siblings:
            sibling.blocks, sibling.computed = list(answer.blocks), answer.computed
            sibling.chain, sibling.cached_tokens = answer.chain.copy(), answer.cached_tokens
            for block in answer.blocks:
                self.pool.share(block)
            sibling.running = True
            self.running.append(sibling)
            step.sampled.append((sibling, place))
        if answer.siblings:
            answer.siblings = []
            self.running.sort(key=_key)

    # --- blocks and places -----------------------------------------------------------------------------------------

    def _writable(self, answer: Answer, plan: StepPlan) -> bool:
        """Give ``answer`` a block of its own for its next token. False when somebody had to be preempted for it; the
        caller looks again."""
        place = answer.computed // self.pool.block_size
        shared = place < len(answer.blocks) and self.pool.references[answer.blocks[place]] > 1
        if place < len(answer.blocks) and not shared:
            return True
        block = self.pool.take()
        if block is None:
            # Rows of this step have smaller keys than ``answer``, so none of them is taken back.
            self.preempt(self.running[-1])
            return False
        if shared:
            old = answer.blocks[place]
            plan.copies.append((old, block))
            answer.blocks[place] = block
            self.pool.give_back([old])
        else:
            answer.blocks.append(block)
        return True

    def preempt(self, answer: Answer) -> None:
        """Take the blocks of a running answer; it waits again, in its old place."""
        self.running.remove(answer)
        self._release(answer)
        answer.computed = 0
        self.add(answer)
        self.preemptions += 1

    def _yield_to_priority(self) -> None:
        """A waiting answer of a smaller priority number takes the place of running ones with a larger."""
        answer = self._first_waiting()
        if answer is None or not self.running or self.running[-1].priority <= answer.priority:
            return
        need = -(-len(answer.tokens) // self.pool.block_size)
        rows, blocks, last = self.max_batch - self._rows, self.pool.free, len(self.running)
        while rows < answer.rows or blocks < need:
            last -= 1
            if last < 0 or self.running[last].priority <= answer.priority:
                return  # not even then would it fit
            rows += self.running[last].rows
            blocks += sum(self.pool.references[block] == 1 for block in self.running[last].blocks)
        for _ in range(len(self.running) - last):
            self.preempt(self.running[-1])

    def _first_waiting(self) -> Answer | None:
        while self._waiting and self._waiting[0][0] in self._gone:
            self._gone.discard(heapq.heappop(self._waiting)[0])
        return self._waiting[0][1] if self._waiting else None

    def _start(self, answer: Answer) -> None:
        answer.running = True
        self._rows += answer.rows
        self.running.append(answer)
        if len(self.running) > 1 and self.running[-2].key > answer.key:
            self.running.sort(key=_key)

    def _release(self, answer: Answer) -> None:
        self._rows -= answer.rows
        answer.running = False
        self.pool.give_back(answer.blocks)
        answer.blocks = []


def _key(answer: Answer) -> tuple[int, int, int]:
    return answer.key
