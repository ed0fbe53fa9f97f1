"""One answer under way: its tokens, its blocks, and how far its keys and values are computed."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

from research.core.engine.blocks import Chain


class Answer:
    """One of the ``n`` answers to a request, or one text to embed. The scheduler moves it, the engine fills it.

    ``tokens`` are the prompt's and the answer's; keys and values of the first ``computed`` of them lie in ``blocks``.
    ``siblings`` are the answers that begin when this one's prompt is computed. ``root`` and ``prompt_length`` say what
    its keys depend on beside the tokens (see :meth:`BlockPool.find`). ``scored``: how many best tokens are wanted at each
    place of the prompt beside its own (None: no log-probabilities of the prompt).
    """

    __slots__ = (
        "adapter",
        "blocks",
        "cached_tokens",
        "chain",
        "choice",
        "computed",
        "embed",
        "key",
        "number",
        "priority",
        "prompt_length",
        "root",
        "running",
        "scored",
        "siblings",
        "state",
        "tokens",
    )

    def __init__(
        self,
        number: int,
        prompt: Sequence[int],
        priority: int = 0,
        choice: int = 0,
        root: Hashable = None,
        adapter: int = 0,
        embed: bool = False,
        scored: int | None = None,
    ):
        self.number, self.choice, self.priority = number, choice, priority
        self.key = (priority, number, choice)  # smaller ones go first and are preempted last
        self.tokens, self.prompt_length = list(prompt), len(prompt)
        self.root, self.adapter, self.embed, self.scored = root, adapter, embed, scored
        self.computed, self.blocks, self.chain = 0, [], Chain(root, 0)
        self.cached_tokens: int | None = None  # of the prompt, found in the prefix cache at the first admission
        self.siblings: list[Answer] = []
        self.running = False
        self.state = None  # the engine's: sampler, text, limits

    @property
    def missing(self) -> int:
        """Tokens whose keys and values are not computed: 1 while it decodes."""
        return len(self.tokens) - self.computed

    @property
    def rows(self) -> int:
        """Rows that it takes now or will take when its prompt is computed."""
        return 1 + len(self.siblings)
