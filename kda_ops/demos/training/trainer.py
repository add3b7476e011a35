"""The training of a byte model: steps, and checkpoints that continue exactly."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kda_ops.demos.training import checkpoints
from kda_ops.demos.training.model import ByteModel
from kda_ops.demos.training.ranks import Ranks
from kda_ops.demos.training.text import Text
from kda_ops.nn.layer import KimiDeltaAttention

WARMUP = 20  # steps in which the learning rate rises; then it is constant, whatever follows
BETAS, WEIGHT_DECAY, LARGEST_NORM = (0.9, 0.95), 0.1, 1.0


@dataclass(frozen=True)
class Settings:
    """What the losses of a run are a function of, with its text.

    Attributes:
        hidden: Width of the residual stream.
        layers: Blocks.
        heads: Heads of a block.
        batch: Sequences of a step.
        length: Bytes of a sequence.
        lr: Learning rate after the warm-up.
        seed: Of weights and batches.
        dtype: `"fp32"`; `"bf16"`, fp32 weights under autocast; `"fp64"`.
    """

    hidden: int
    layers: int
    heads: int
    batch: int
    length: int
    lr: float
    seed: int
    dtype: str


class Trainer:
    """A model, its optimizer and its losses so far.

    `ours` says whether it has layers of ours, `size` how many parameters.

    Args:
        settings: The run.
        text: What to train on.
        device: Where.
        eager: Not compiled.
        ranks: The processes, all of which make and use a trainer in the same way.
        mixer: Makes another layer in the place of each of ours, with its weights. Such a model may
            break graphs.
    """

    def __init__(
        self,
        settings: Settings,
        text: Text,
        device: torch.device,
        *,
        eager: bool = False,
        ranks: Ranks | None = None,
        mixer: Callable[[KimiDeltaAttention], nn.Module] | None = None,
    ) -> None:
        self.settings, self.text, self.device = settings, text.to(device), device
        torch.manual_seed(settings.seed)
        # made on the CPU in fp32: the same weights for every device and dtype
        self.model = ByteModel(settings.hidden, settings.layers, settings.heads)
        if mixer is not None:
            self.model.replace_mixers(mixer)
        self.model.to(device, torch.float64 if settings.dtype == "fp64" else None)
        self.ranks, self.ours = ranks or Ranks(), mixer is None
        self._names = [name for name, _ in self.model.named_parameters()]
        self.size = sum(p.numel() for p in self.model.parameters())
        if not eager:
            self.model.compile_blocks(fullgraph=mixer is None)
        if self.ranks.world > 1:
            from kda_ops.demos.training.sharding import spread  # loads DTensor

            mesh, context = self.ranks.mesh(device.type), self.ranks.context(device.type)
            spread(self.model, mesh, context)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), settings.lr, betas=BETAS, weight_decay=WEIGHT_DECAY, fused=True
        )
        self.losses: list[float] = []
        self._unread: list[Tensor] = []

    @property
    def steps(self) -> int:
        """Steps that are done."""
        return len(self.losses) + len(self._unread)

    def step(self) -> None:
        """One step; its loss is in `losses` after the next `read`."""
        s = self.settings
        for group in self.optimizer.param_groups:
            group["lr"] = s.lr * min(1.0, (self.steps + 1) / WARMUP)
        text = self.ranks.share(self.text.batch(s.seed, self.steps, s.batch, s.length))
        with torch.autocast(self.device.type, torch.bfloat16, enabled=s.dtype == "bf16"):
            loss = self.model(text)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), LARGEST_NORM)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self._unread.append(loss.detach())

    def read(self) -> list[float]:
        """Waits for the device, and returns the losses of the steps since the last call: the means
        over the whole batch, the same on all ranks.
        """
        new = self.ranks.mean(torch.stack(self._unread)).tolist() if self._unread else []
        self.losses += new
        self._unread = []
        return new

    def save(self, path: Path) -> None:
        """Writes a checkpoint, whole or not at all: a file, or a folder of several ranks."""
        self.read()
        facts: dict[str, Any] = {
            "format": checkpoints.FORMAT,
            "settings": dataclasses.asdict(self.settings),
            "text": {"path": self.text.path, "digest": self.text.digest},
            "losses": self.losses,
        }
        if self.ranks.world > 1:
            state = checkpoints.state_of(self.model, self.optimizer)
            checkpoints.save_folder(path, facts, state, self.ranks.first)
            return
        facts |= {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
        checkpoints.save_file(path, facts)

    @torch.no_grad()
    def restore(self, saved: dict[str, Any]) -> None:
        """Continues from what `load_checkpoint` returned, whatever the number of ranks was."""
        self.losses = list(saved["losses"])
        several = self.ranks.world > 1
        if "folder" in saved:
            state = checkpoints.state_of(self.model, self.optimizer)
            checkpoints.load_folder(saved["folder"], state, several)
        elif several:
            checkpoints.fill_from_file(self.model, self.optimizer, self._names, saved)
        else:
            self.model.load_state_dict(saved["model"])
            self.optimizer.load_state_dict(saved["optimizer"])
            return
        checkpoints.set_steps(self.optimizer, self.steps)
