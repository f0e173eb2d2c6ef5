"""Words for what a run recorded: causes, columns, and texts from files that may be anybody's."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

from dyntune.monitor.alerts import Cause
from dyntune.records import short_number

__all__ = ["CAUSES", "capital", "clause", "column", "counted", "listed", "number", "plain", "sentence"]

MOST_TEXT = 400  # characters of a text from a file
MOST_NAME = 60  # and of a name

# Each fits after "the likeliest cause is that".
CAUSES: Mapping[str, str] = {
    Cause.LR_TOO_HIGH: "the learning rate is too high",
    Cause.LR_TOO_LOW: "the learning rate is too low",
    Cause.WARMUP_MISSING: "the learning rate was not warmed up",
    Cause.NOISE_PLATEAU: "the noise of small batches holds the loss where it is",
    Cause.GROUP_LR: "one parameter group has a wrong learning rate",
    Cause.GROUP_WEIGHT_DECAY: "one parameter group has a wrong weight decay",
    Cause.BETA2_TOO_SMALL: "Adam's beta2 is too small, so that single batches decide how long steps are",
    Cause.STALE_SECOND_MOMENT: "Adam's second moment is out of date: gradients have grown since it was made",
    Cause.EPS_TOO_LARGE: "Adam's eps is too large for these gradients",
    Cause.CLIP_TOO_LOW: "gradients are clipped too much",
    Cause.VANISHING: "gradients vanish on their way down through the layers",
    Cause.EXPLODING: "gradients explode on their way through the layers",
    Cause.DEAD_UNITS: "units are dead: they answer to no input",
    Cause.ATTENTION_LOGITS: "attention logits have grown too large",
    Cause.OUTPUT_LOGITS: "output logits drift away",
    Cause.NON_FINITE: "a number in the network is not finite",
    Cause.FROZEN: "parameters are kept from training: frozen, or unknown to the optimizer",
    Cause.DISCONNECTED: "parameters do not take part in the loss",
    Cause.BAD_BATCH: "a batch, or several, is damaged or of another kind than the others",
    Cause.DATA_ORDER: "the data come in an order that matters",
    Cause.WRONG_LABELS: "labels do not belong to their inputs",
    Cause.ACCUMULATED_GRADIENTS: "gradients are not cleared between steps",
    Cause.WRONG_LOSS: "the loss is not the right one for these outputs",
    Cause.LOSS_SCALE: "the loss has a wrong scale",
}

_COLUMNS: Mapping[str, str] = {
    "train/loss": "loss",
    "train/lr": "learning rate",
    "grad/norm": "gradient norm",
    "start": "loss at the start",
    "best": "best loss",
    "first": "at the first look",
    "level": "usual value",
    "score": "standard deviations above it",
    "raised": "factor on the learning rate",
    "grown": "factor on the gradient",
    "groups": "factor between learning rates of groups",
    "left": "share of the highest learning rate that is left",
    "highest_lr": "highest learning rate",
    "peak": "highest loss",
    "norm": "gradient norm",
    "update_ratio": "relative step of the median tensor",
    "update/unheld": "tensors that no optimizer writes to",
    "update/unheld/share": "their share of all parameters",
    "grad/unreached": "tensors that no gradient reaches",
    "grad/unreached/share": "their share of all parameters",
    "grad/amplitude": "gradient over that of two steps before",
    "stability/step_curvature": "curvature along the step times learning rate",
}
_PREFIXES: Mapping[str, str] = {
    "grad/log_rms/": "log of the gradient's size in",
    "activation/log_rms/": "log of what is returned by",
    "update/ratio/": "relative step of",
    "adam/staleness/": "gradient over the second moment in",
    "adam/below_eps/": "share of entries below eps in",
    "units/dead/": "share of dead units in",
}


def plain(item: object, *, most: int = MOST_TEXT) -> str:
    """On one line, without what a terminal would obey."""
    said = "".join(c if c.isprintable() else " " if c.isspace() else "\N{REPLACEMENT CHARACTER}" for c in str(item))
    said = " ".join(said.split())
    return said if len(said) <= most else f"{said[: most - 1]}…"


def capital(text: str) -> str:
    """With a capital letter."""
    return f"{text[:1].upper()}{text[1:]}"


def sentence(text: str) -> str:
    """With a capital letter and a full stop.

    Example:
        >>> sentence("the loss is nan")
        'The loss is nan.'
    """
    text = text.strip()
    return f"{capital(text)}{'' if text.endswith(('.', '!', '?', ')')) else '.'}" if text else ""


def clause(text: str, *, most: int = 120) -> str:
    """The first sentence without its full stop.

    Example:
        >>> clause("the loss is nan. It had grown from 1.5 to 40.")
        'the loss is nan'
    """
    return plain(text.split(". ")[0].rstrip(". "), most=most)


def number(value: object) -> str:
    """A value from a record."""
    if value is None:
        return "not known"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, (int, float)):
        return short_number(float(value)) if math.isfinite(value) else str(float(value))
    return plain(value, most=MOST_NAME)


def column(name: str) -> str:
    """A column, or a number of an alert's evidence, as people write it."""
    if name in _COLUMNS:
        return _COLUMNS[name]
    for prefix, said in _PREFIXES.items():
        if name.startswith(prefix):
            return f"{said} {plain(name.removeprefix(prefix), most=MOST_NAME)}"
    return plain(name.replace("_", " "), most=MOST_NAME)


def listed(items: Iterable[object], *, most: int = 4, joint: str = ", ") -> str:
    """Some names in a row, and how many more there are.

    Example:
        >>> listed("abcdef")
        'a, b, c, d and 2 more'
    """
    said = [plain(item, most=MOST_TEXT) for item in items]
    more = len(said) - most
    return joint.join(said[:most]) + (f" and {more} more" if more > 0 else "")


def counted(count: int, what: str) -> str:
    """A count with its noun.

    Example:
        >>> counted(1, "step"), counted(1200, "step")
        ('1 step', '1,200 steps')
    """
    return f"{count:,} {what}{'' if count == 1 else 's'}"
