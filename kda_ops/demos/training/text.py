"""The text that a model is trained on, as bytes, and the batches of a run."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

HELP_TOPICS = "Python's help topics"


@dataclass(frozen=True)
class Text:
    """A text.

    Attributes:
        name: What it is called in what is printed.
        path: The file it is from, or None for `HELP_TOPICS`.
        content: Its bytes, uint8.
        digest: Their SHA-256.
    """

    name: str
    path: str | None
    content: Tensor
    digest: str

    def batch(self, seed: int, step: int, rows: int, length: int) -> Tensor:
        """`[rows, length + 1]`: pieces from random places.

        A function of the seed and the step alone: a resumed run has the batches that the whole run
        would have had.
        """
        # the two mixed by a hash: seeds that are neighbors would share batches otherwise
        mixed = hashlib.sha256(f"{seed}/{step}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(mixed[:7], "big"))
        starts = torch.randint(len(self.content) - length, (rows, 1), generator=generator)
        places = starts + torch.arange(length + 1)
        return self.content[places.to(self.content.device)].long()

    def to(self, device: torch.device) -> "Text":
        """The text with its content on a device."""
        return Text(self.name, self.path, self.content.to(device), self.digest)


def read_text(path: Path | None) -> Text:
    """The text in a file, or the help topics that every Python has.

    Raises:
        OSError: The file cannot be read.
        ImportError: This Python comes without its help topics.
    """
    if path is None:
        from pydoc_data.topics import topics

        raw, name = "\n\n".join(topics.values()).encode(), HELP_TOPICS
    else:
        raw, name = path.read_bytes(), path.name
    content = torch.frombuffer(bytearray(raw), dtype=torch.uint8)
    where = None if path is None else str(path.resolve())
    return Text(name, where, content, hashlib.sha256(raw).hexdigest())
