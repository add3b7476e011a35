"""One rank that prefills and continues sequences on its caches, with prefix caching.

Everything here is deterministic, so that the ranks of an engine, given the same commands, allocate
the same blocks in the same order.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

import kda_ops
from kda_ops.cache.align import AlignStep, after_sampling, before_forward
from kda_ops.cache.batch import KDABatch
from kda_ops.demos.disaggregated.model import Caches, Stack


@dataclass(frozen=True)
class Hit:
    """The cached part of a prompt.

    Attributes:
        blocks: Blocks of keys and values, from the start.
        state: The slot of the state after all cached tokens, or None.
    """

    blocks: list[int]
    state: int | None


class Sequences:
    """Blocks, and the forward passes over them."""

    def __init__(self, model: Stack, caches: Caches) -> None:
        self.model, self.caches, self.config = model, caches, model.config
        self.free = [list(range(self.config.pages - 1, 0, -1)) for _ in range(2)]
        self.cached_blocks: dict[tuple[int, ...], int] = {}
        self.cached_states: dict[tuple[int, ...], int] = {}
        # by `time.perf_counter`, when the last prompt's first token was there: after a prefill of
        # all of it, and of `generate`
        self.prefilled_at = self.first_token_at = 0.0

    def take(self, group: int, count: int) -> list[int]:
        """Allocates blocks of the state group (0) or the attention group (1)."""
        return [self.free[group].pop() for _ in range(count)]

    def give(self, group: int, blocks: Sequence[int]) -> None:
        """Frees them."""
        self.free[group].extend(block for block in blocks if block)

    def blocks_of(self, tokens: int) -> int:
        return -(-tokens // self.config.block_tokens)

    def prefill(self, tokens: Sequence[int]) -> tuple[torch.Tensor, list[list[int]]]:
        """Computes a prompt from scratch; returns logits, and its blocks per group."""
        count = self.blocks_of(len(tokens))
        table = [0] * (count - 1) + self.take(0, 1)
        blocks = self.take(1, count)
        device = self.config.device
        batch = KDABatch.prefill([len(tokens)], [table[-1]], device=device)
        logits = self.model(torch.tensor(tokens, device=device), self.caches, batch, blocks, 0)
        return logits, [table, blocks]

    def hit(self, tokens: Sequence[int]) -> Hit:
        """The cached part of a prompt."""
        size, blocks = self.config.block_tokens, []
        for end in range(size, len(tokens) + 1, size):
            block = self.cached_blocks.get(tuple(tokens[:end]))
            if block is None:
                break
            blocks.append(block)
        return Hit(blocks, self.cached_states.get(tuple(tokens)))

    def generate(
        self,
        tokens: list[int],
        count: int,
        table: list[int],
        blocks: list[int],
        drafts: Sequence[int] = (),
    ) -> tuple[list[int], list[int]]:
        """Continues a prompt whose caches hold all tokens but the last one.

        Args:
            tokens: The prompt; the new tokens are appended.
            count: The least number of new tokens.
            table: Slots of the state group by position; the state is in the last one.
            blocks: Blocks of the attention group.
            drafts: A draft model's proposals for the new tokens, right or wrong.

        Returns:
            The new tokens, and how many each step accepted.
        """
        prompt = len(tokens)
        kept: list[int] = []
        computed, accepted, running = prompt - 1, 1, -1
        first_checkpoint = computed
        while len(tokens) - prompt < count:
            done = len(tokens) - prompt
            draft = list(drafts[done : done + min(self.config.num_spec, count - done - 1)])
            scheduled = 1 + len(draft)
            needed = self.blocks_of(computed + scheduled)
            table += self.take(0, needed + self.config.num_spec - len(table))
            blocks += self.take(1, needed - len(blocks))
            step = self._align(
                before_forward, table, computed, scheduled, accepted, running, draft=None
            )
            accepted, running = int(step.num_accepted), int(step.running_block)
            slots = table[running : running + 1 + self.config.num_spec]
            batch = KDABatch.decode(
                [slots], lengths=[scheduled], num_accepted=[accepted], device=self.config.device
            )
            ids = torch.tensor([tokens[-1], *draft], device=self.config.device)
            picks = self.model(ids, self.caches, batch, blocks, computed).argmax(-1).tolist()
            if not kept:
                self.first_token_at = time.perf_counter()
            accepted = 1
            while accepted <= len(draft) and draft[accepted - 1] == picks[accepted - 1]:
                accepted += 1
            new = picks[:accepted]
            kept.append(accepted)
            step = self._align(
                after_sampling, table, computed, scheduled, accepted, running, draft=len(draft)
            )
            computed += accepted
            accepted = int(step.num_accepted)
            tokens += new
        self._remember(tokens[:computed], first_checkpoint, table, blocks)
        return tokens[prompt:], kept

    def _align(
        self,
        planner: Callable[..., AlignStep],
        table: list[int],
        computed: int,
        scheduled: int,
        accepted: int,
        running: int,
        draft: int | None,
    ) -> AlignStep:
        """Plans and makes the copies of one sequence."""
        counts = {
            "num_computed": computed,
            "num_scheduled": scheduled,
            "num_accepted": accepted,
            "running_block": running,
        }
        if draft is not None:
            counts["num_draft"] = draft
        device = self.config.device
        step = planner(
            torch.tensor([table], device=device),
            **{name: torch.tensor([value], device=device) for name, value in counts.items()},
            block_tokens=self.config.block_tokens,
        )
        kda_ops.state_copy(
            self.caches.conv,
            self.caches.recurrent,
            step.plan,
            layout=self.config.layout,
            num_spec=self.config.num_spec,
        )
        return step

    def _remember(
        self, tokens: list[int], first_checkpoint: int, table: list[int], blocks: list[int]
    ) -> None:
        """Caches full blocks, and the states at their ends from the first one that was kept."""
        size = self.config.block_tokens
        for i in range(len(tokens) // size):
            end = (i + 1) * size
            self.cached_blocks.setdefault(tuple(tokens[:end]), blocks[i])
            if end >= first_checkpoint:
                self.cached_states.setdefault(tuple(tokens[:end]), table[i])
