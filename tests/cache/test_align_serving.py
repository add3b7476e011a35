"""Requests on a server with checkpoints, prefix hits and speculative decode, on real layers: their
answers and all cached states equal those of an undisturbed run.
"""

import random
from collections import Counter
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor, nn

import kda_ops
from kda_ops.cache.align import after_sampling, before_forward
from kda_ops.cache.batch import KDABatch
from kda_ops.cache.spec import KDAStateSpec
from kda_ops.nn.layer import KimiDeltaAttention

HIDDEN, WORDS, LAYERS, HISTORY = 16, 24, 2, 3
KEY_HEADS, VALUE_HEADS, KEY_DIM, VALUE_DIM = 2, 4, 8, 12
SLOTS = 600


class Model(nn.Module):
    """A few KDA layers between embedding and logits."""

    def __init__(self, layout: str) -> None:
        super().__init__()
        torch.manual_seed(7)
        self.embedding = nn.Embedding(WORDS, HIDDEN)
        self.layers = nn.ModuleList(
            KimiDeltaAttention(
                HIDDEN,
                KEY_DIM,
                KEY_HEADS,
                num_v_heads=VALUE_HEADS,
                expand_v=VALUE_DIM / KEY_DIM,
                conv_layout=layout,
            )
            for _ in range(LAYERS)
        )
        self.head = nn.Linear(HIDDEN, WORDS)
        for weight in self.parameters():
            if weight.dim() > 1:
                nn.init.normal_(weight, std=0.5)

    @torch.no_grad()
    def forward(self, tokens: list[int], states: tuple[Tensor, Tensor], batch: KDABatch) -> Tensor:
        x = self.embedding(torch.tensor(tokens))[None]
        for i, layer in enumerate(self.layers):
            state = (states[0][i], states[1][i])
            x = x + layer(nn.functional.layer_norm(x, (HIDDEN,)), state=state, batch=batch)
        return self.head(x)[0]


def assert_same(state: Tensor, expected: Tensor) -> None:
    """Equal up to the order of fp32 sums, through layers and tokens."""
    assert state.shape == expected.shape
    error = (state - expected).abs().max()
    assert error <= 4096 * torch.finfo(torch.float32).eps * expected.abs().max(), error


def spec(layout: str, num_spec: int, page_bytes: int | None = None) -> KDAStateSpec:
    return KDAStateSpec(
        KEY_HEADS,
        VALUE_HEADS,
        KEY_DIM,
        VALUE_DIM,
        num_spec=num_spec,
        conv_dtype=torch.float32,
        layout=layout,
        page_bytes=page_bytes,
    )


@dataclass(eq=False)
class Request:
    """A prompt, the answer of an undisturbed run, and the server's progress.

    `table` are slots by position, `owned` those that are the request's own; the rest is align's.
    """

    tokens: list[int]
    answer: list[int]
    target: int
    made: int = 0
    computed: int = 0
    accepted: int = 1
    running: int = -1
    table: list[int] = field(default_factory=list)
    owned: list[int] = field(default_factory=list)


class Server:
    """Up to four requests in a batch, some of them preempted, on slots that are reused."""

    def __init__(self, seed: int, layout: str, block: int, num_spec: int) -> None:
        self.rng = random.Random(seed)
        self.layout, self.block, self.num_spec = layout, block, num_spec
        self.model = Model(layout)
        padded = spec(layout, num_spec, spec(layout, num_spec).page_bytes + 516)
        self.states = padded.allocate(SLOTS, layers=LAYERS)
        self.free = list(range(1, SLOTS))
        self.rng.shuffle(self.free)
        self.text = [self.rng.randrange(WORDS) for _ in range(30)]
        self.requests: list[Request] = []
        self.kept: dict[tuple[int, ...], int] = {}  # slots of checkpoints by what they have seen
        self.bits: dict[tuple[int, ...], tuple[Tensor, Tensor]] = {}
        self.seen: Counter[str] = Counter()

    def alone(self, tokens: list[int], count: int) -> tuple[list[int], tuple[Tensor, Tensor]]:
        """The answer of an undisturbed run, and its states of `tokens` in slot 1."""
        states = spec(self.layout, 0).allocate(2, layers=LAYERS)
        logits = self.model(tokens, states, KDABatch.prefill([len(tokens)], [1]))
        prompt = (states[0].clone(), states[1].clone())
        answer = []
        for _ in range(count):
            answer.append(int(logits[-1].argmax()))
            logits = self.model(answer[-1:], states, KDABatch.decode([1]))
        return answer, prompt

    def come(self) -> None:
        """A new request; many share a start."""
        prompt = self.text[: self.rng.randint(1, 30)]
        prompt += [self.rng.randrange(WORDS) for _ in range(self.rng.randint(0, 5))]
        target = self.rng.randint(1, 20)
        answer, _ = self.alone(prompt, target + self.num_spec + 1)
        self.requests.append(Request(prompt, answer, target))
        self.start(self.requests[-1])

    def start(self, request: Request) -> None:
        """Starts from scratch, or from a checkpoint of any request."""
        ends = range(self.block, len(request.tokens), self.block)
        hits = [end for end in ends if tuple(request.tokens[:end]) in self.kept]
        end = self.rng.choice([0, *hits])
        self.seen["hits"] += end > 0
        request.computed, request.running = end, -1
        request.accepted = self.rng.randint(1, 1 + self.num_spec)  # of what it was before
        request.table = [0] * (end // self.block)
        if end:
            request.table[-1] = self.kept[tuple(request.tokens[:end])]

    def leave(self, request: Request) -> None:
        """Frees the slots without a checkpoint."""
        kept = set(self.kept.values())
        self.free += [slot for slot in request.owned if slot not in kept]
        request.owned = []

    def take(self) -> int:
        """A slot whose last contents must not be used."""
        slot = self.free.pop()
        for state in self.states:
            state[:, slot] = float("nan")
        return slot

    def schedule(self, request: Request) -> tuple[int, list[int], bool]:
        """Tokens and drafts of the next step, and whether it is a prefill."""
        left = len(request.tokens) - request.computed
        if self.rng.random() < 0.1:
            return 0, [], False
        # a request that comes back with all but its last token may go on as a decode
        fresh = request.running < 0 and (request.computed == 0 or self.rng.random() < 0.5)
        if left > 1 or fresh:
            ends = [n for n in range(1, left) if (request.computed + n) % self.block == 0]
            choice = [left, self.rng.choice(ends or [left]), self.rng.randint(1, left)]
            return self.rng.choice(choice), [], True
        drafts = request.answer[request.made :][: self.rng.randint(0, self.num_spec)]
        drafts = [t if self.rng.random() < 0.75 else (t + 1) % WORDS for t in drafts]
        return 1 + len(drafts), drafts, False

    def step(self) -> None:
        while not self.requests or (len(self.requests) < 4 and self.rng.random() < 0.6):
            self.come()
        for request in self.requests:
            if request.running >= 0 and self.rng.random() < 0.06:
                self.leave(request)
                self.start(request)
                self.seen["preempted"] += 1
        steps = [self.schedule(request) for request in self.requests]
        scheduled = [n for n, _, _ in steps]
        for request, n in zip(self.requests, scheduled, strict=True):
            needed = -(-(request.computed + n) // self.block) + self.num_spec
            fresh = [self.take() for _ in range(needed - len(request.table))]
            request.table += fresh
            request.owned += fresh
        width = max(1, *(len(request.table) for request in self.requests))
        table = torch.tensor([r.table + [0] * (width - len(r.table)) for r in self.requests])
        counts = {
            "num_computed": torch.tensor([r.computed for r in self.requests]),
            "num_scheduled": torch.tensor(scheduled),
        }
        before = before_forward(
            table,
            **counts,
            num_accepted=torch.tensor([r.accepted for r in self.requests]),
            running_block=torch.tensor([r.running for r in self.requests]),
            block_tokens=self.block,
        )
        self.copy(before.plan)
        picks = self.forward(steps, before.num_accepted.tolist(), before.running_block.tolist())
        accepted = before.num_accepted.tolist()
        for r, (_, drafts, _) in enumerate(steps):
            if picks[r]:
                accepted[r] = 1
                while (
                    accepted[r] <= len(drafts)
                    and drafts[accepted[r] - 1] == picks[r][accepted[r] - 1]
                ):
                    accepted[r] += 1
        after = after_sampling(
            table,
            **counts,
            num_draft=torch.tensor([len(drafts) for _, drafts, _ in steps]),
            num_accepted=torch.tensor(accepted),
            running_block=before.running_block,
            block_tokens=self.block,
        )
        self.copy(after.plan)
        for r, (request, (n, drafts, prefill)) in enumerate(
            zip(list(self.requests), steps, strict=True)
        ):
            request.accepted = int(after.num_accepted[r])
            request.running = int(after.running_block[r])
            if n:
                new = picks[r][-1:] if prefill else picks[r][: accepted[r]]
                if prefill and request.computed + n < len(request.tokens):
                    new = []
                self.finish(request, n - len(drafts), accepted[r], new)
        self.check_kept()

    def copy(self, plan: Tensor) -> None:
        kda_ops.state_copy(*self.states, plan, layout=self.layout, num_spec=self.num_spec)

    def forward(
        self, steps: list[tuple[int, list[int], bool]], accepted: list[int], running: list[int]
    ) -> list[list[int]]:
        """The model's next token after every token of the step, per request."""
        decodes = [r for r, (n, _, prefill) in enumerate(steps) if n and not prefill]
        prefills = [r for r, (n, _, prefill) in enumerate(steps) if n and prefill]
        picks: list[list[int]] = [[] for _ in steps]
        order = [*decodes, *prefills]
        if not order:
            return picks
        tokens, slots = [], []
        for r in order:
            request, (n, drafts, prefill) = self.requests[r], steps[r]
            start = request.computed
            tokens += (
                request.tokens[start : start + n] if prefill else [request.tokens[-1], *drafts]
            )
            slots.append(request.table[running[r] :][: 1 + self.num_spec])
        padding = self.rng.randint(0, 2)
        batch = KDABatch.mixed(
            [steps[r][0] for r in decodes],
            [steps[r][0] for r in prefills],
            slots,
            has_initial_state=[self.requests[r].computed > 0 for r in prefills],
            num_accepted=[accepted[r] for r in decodes],
            num_tokens=len(tokens) + padding,
        )
        logits = self.model(tokens + [0] * padding, self.states, batch)[: len(tokens)]
        assert logits.isfinite().all(), "a state was read that nobody has written"
        for r, part in zip(
            order, logits.argmax(-1).split([steps[r][0] for r in order]), strict=True
        ):
            picks[r] = part.tolist()
        return picks

    def finish(self, request: Request, verified: int, kept: int, new: list[int]) -> None:
        """Takes the new tokens; remembers the state at the last boundary that was passed."""
        first = request.computed + verified
        request.tokens += new
        request.made += len(new)
        request.computed = first + kept - 1
        self.seen[f"kept {kept}"] += 1
        boundary = request.computed // self.block * self.block
        seen = tuple(request.tokens[:boundary])
        if boundary >= first and seen not in self.kept:
            slot = request.table[boundary // self.block - 1]
            self.kept[seen], self.bits[seen] = slot, self.state(slot)
            _, right = self.alone(list(seen), 0)
            for state, expected in zip(self.bits[seen], right, strict=True):
                assert_same(state, expected[:, 1])
            self.seen["checkpoints"] += 1
        answered = request.answer[: request.made]
        assert request.tokens[len(request.tokens) - request.made :] == answered
        if request.made >= request.target:
            self.leave(request)
            self.requests.remove(request)
            self.seen["finished"] += 1

    def state(self, slot: int) -> tuple[Tensor, Tensor]:
        """History rows and matrix of a slot, in all layers."""
        conv, recurrent = (state[:, slot] for state in self.states)
        rows = conv[:, :HISTORY] if self.layout == "SD" else conv[..., :HISTORY]
        return rows.clone(), recurrent.clone()

    def check_kept(self) -> None:
        """No checkpoint has changed since it was made."""
        for seen, slot in self.kept.items():
            for was, found in zip(self.bits[seen], self.state(slot), strict=True):
                assert torch.equal(was, found), f"the state after {len(seen)} tokens has changed"


@pytest.mark.parametrize("layout", ["SD", "DS"])
@pytest.mark.parametrize(("block", "num_spec"), [(2, 3), (4, 2), (8, 3)])
def test_answers_and_checkpoints_equal_an_undisturbed_run(
    layout: str, block: int, num_spec: int
) -> None:
    server = Server(block, layout, block, num_spec)
    for _ in range(18):
        server.step()
    kinds = {"hits", "preempted", "checkpoints", "finished"}
    kinds |= {f"kept {n}" for n in range(1, 2 + num_spec)}
    assert all(server.seen[kind] for kind in kinds), server.seen
