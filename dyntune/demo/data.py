"""Real English text that every Python brings along: the topics of its interactive help."""

from __future__ import annotations

from dataclasses import dataclass

import torch

__all__ = ["Batch", "Text", "english"]

Batch = tuple[torch.Tensor, torch.Tensor]  # characters (B, T) and the ones that follow them (B, T)


@dataclass(frozen=True)
class Text:
    """A text as numbers.

    Args:
        characters: Every character that occurs, in the order of their numbers.
        train: The first nine tenths, shape (n,).
        held_out: The last tenth.
    """

    characters: str
    train: torch.Tensor
    held_out: torch.Tensor

    def batches(self, part: torch.Tensor, count: int, *, size: int, length: int, seed: int) -> list[Batch]:
        """Windows at random places: `count` batches of `size` windows, `length` characters long."""
        generator = torch.Generator().manual_seed(seed)
        starts = torch.randint(len(part) - length - 1, (count, size, 1), generator=generator)
        windows = part[starts + torch.arange(length + 1)]  # (count, B, T + 1)
        return [(window[:, :-1], window[:, 1:]) for window in windows]


def english() -> Text:
    """The help topics, about 450,000 characters; which ones depends on the version of Python."""
    from pydoc_data.topics import topics

    text = "\n\n".join(topics[name] for name in sorted(topics))
    characters = "".join(sorted(set(text)))
    number = {character: i for i, character in enumerate(characters)}
    encoded = torch.tensor([number[character] for character in text])
    cut = len(encoded) * 9 // 10
    return Text(characters, encoded[:cut], encoded[cut:])
