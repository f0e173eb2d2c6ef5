"""Training steps from the names of checkpoint files."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

__all__ = ["steps_in_names"]

# A whole number that is no part of a decimal one, with the word in front of it.
_NUMBER = re.compile(r"([A-Za-z]*)[-_=]*(?<![\d.])(\d{1,18})(?![\d.])")


def steps_in_names(paths: Sequence[str | os.PathLike[str]]) -> list[int] | None:
    """The steps that file names speak of; None where they do not say so without doubt.

    The paths must be alike but for one number, ``run/step_100.pt`` and ``run/step_200.pt``, or
    ``checkpoint-100/model.safetensors``. Where several numbers differ, as in ``epoch=1-step=400.ckpt``, the one that
    follows the word *step* counts.

    Example:
        >>> steps_in_names(["resnet50_step100.pt", "resnet50_step20.pt"])
        [100, 20]
        >>> steps_in_names(["a1_b2.pt", "a3_b5.pt"]) is None
        True
    """
    found = [_NUMBER.findall(str(Path(path).with_suffix(""))) for path in paths]
    if len({tuple(word for word, _ in numbers) for numbers in found}) != 1:
        return None
    numbers = [[int(digits) for _, digits in row] for row in found]
    words = [word.lower() for word, _ in found[0]]
    candidates = [i for i in range(len(words)) if len({row[i] for row in numbers}) == len(paths)]
    if len(paths) == 1:  # nothing differs: the only number of the file's own name, if it has one
        candidates = candidates[-1:] if len(_NUMBER.findall(Path(paths[0]).stem)) == 1 else []
    moving = [i for i in range(len(words)) if len({row[i] for row in numbers}) > 1]
    if len(moving) > 1:
        candidates = [i for i in candidates if words[i] in ("step", "steps")]
    if len(candidates) != 1:
        return None
    return [row[candidates[0]] for row in numbers]
