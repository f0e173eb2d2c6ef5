"""``dyntune lr package.module:setup``: a learning rate from the shell."""

from __future__ import annotations

import argparse
import inspect
import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from dyntune.commands.target import UserCodeError, call_target, importable_here, users_code
from dyntune.errors import InvalidArgumentError
from dyntune.records import Recommendation, Status
from dyntune.suggest.lr import suggest_lr

__all__ = ["add"]

DESCRIPTION = """\
Suggests a peak learning rate for the model that setup() makes, with a range and the evidence. The current directory
can be imported from. setup() takes no arguments and returns what dyntune.suggest_lr takes, as a mapping

    def setup():
        return {"model": model, "batches": loader, "criterion": loss, "optimizer": optimizer}

with "model", "batches" and any other of its arguments, or as a tuple (model, batches) or (model, batches, loss_fn).

Exit status: 0 with a learning rate, also an uncertain one (the status says so); 1 when none could be established, or on
an error; 2 for wrong usage."""

# What the command line decides itself.
_OWN = ("progress", "strict")


def add(commands: Any, *, say: Callable[[str], None]) -> None:
    """Add the command to a parser.

    Args:
        commands: What ``ArgumentParser.add_subparsers()`` returned.
        say: Prints one line.
    """
    parser = commands.add_parser(
        "lr",
        help="a learning rate for a model of yours",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "target", metavar="package.module:setup", help="a function that returns model, batches and loss"
    )
    parser.add_argument(
        "--max-gradients", type=int, metavar="N", help="budget in forward-and-backward passes (default: 200)"
    )
    parser.add_argument("--seed", type=int, metavar="S", help="of dropout and start vectors (default: 0)")
    parser.add_argument("--json", type=Path, metavar="PATH", help="also write everything that was found to a file")
    parser.set_defaults(run=lambda arguments: _run(arguments, say))


def _run(arguments: argparse.Namespace, say: Callable[[str], None]) -> int:
    path: Path | None = arguments.json
    if path is not None and not path.absolute().parent.is_dir():
        raise InvalidArgumentError(f"--json {path}: the folder {path.parent} does not exist; make it first.")
    given = {"max_gradients": arguments.max_gradients, "seed": arguments.seed}
    try:
        with importable_here():
            options = _options(call_target(arguments.target), arguments.target)
            options |= {name: number for name, number in given.items() if number is not None}
            with users_code(f"measuring what {arguments.target}() returned"):
                found = suggest_lr(**options)
    except UserCodeError as error:
        sys.stderr.write(error.report())
        return 1
    return _show(found, path, say)


def _options(made: Any, target: str) -> dict[str, Any]:
    """The arguments of suggest_lr from what setup() returned.

    Raises:
        InvalidArgumentError: Neither a mapping with those names nor a tuple of two or three.
    """
    names = [name for name in inspect.signature(suggest_lr).parameters if name not in _OWN]
    if isinstance(made, tuple) and len(made) in (2, 3):
        return dict(zip(names, made, strict=False))
    wanted = 'a mapping with "model" and "batches", or a tuple (model, batches) or (model, batches, loss_fn)'
    if not isinstance(made, Mapping):
        size = f" of {len(made)}" if isinstance(made, tuple) else ""
        raise InvalidArgumentError(f"{target}() returned a {type(made).__name__}{size}; it has to return {wanted}.")
    missing = [name for name in ("model", "batches") if name not in made]
    unknown = [str(name) for name in made if name not in names]
    if missing or unknown:
        wrong = [f"lacks {', '.join(missing)}"] if missing else []
        wrong += [f"has {', '.join(unknown)}, which suggest_lr does not take"] if unknown else []
        raise InvalidArgumentError(
            f"the mapping that {target}() returned {' and '.join(wrong)}; it has to return {wanted}. The other names "
            f"are {', '.join(names[2:])}."
        )
    return dict(made)


def _show(found: Recommendation, path: Path | None, say: Callable[[str], None]) -> int:
    say(found.explain())
    if path is not None:
        try:
            path.write_text(json.dumps(found.to_dict(), indent=2, allow_nan=False) + "\n", encoding="utf-8")
        except OSError as error:
            sys.stderr.write(f"dyntune: --json {path}: {error.strerror}; the file could not be written.\n")
            return 1
    if found.status is not Status.OK:
        sys.stderr.write(f"dyntune: {found.status.name.lower()}: {found.reason or found.status.value}\n")
    return 0 if found.status.usable else 1
