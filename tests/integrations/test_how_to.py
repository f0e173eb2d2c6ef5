"""The code on the page about learning rates runs, for a reader who has a module and two trainers."""

from __future__ import annotations

from pathlib import Path

import pytest

from dyntune.commands.lr import _options
from tests.documents import ROOT, readers_names, run
from tests.integrations import test_lightning as lightning
from tests.integrations import test_transformers as transformers

PAGE = ROOT / "docs" / "how-to" / "learning-rate.md"

pytestmark = lightning.pytestmark


@pytest.mark.slow
def test_the_code_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    hf_trainer = transformers.made(tmp_path)
    names = readers_names() | {
        "module": lightning.Classifier(),
        "datamodule": lightning.Data(),
        "trainer": lightning.made(),
        "hf_trainer": hf_trainer,
    }
    run(PAGE, names)
    assert hf_trainer.args.learning_rate != 5e-5  # the default
    assert names["rec"].value is not None
    assert _options(names["setup"](), "train:setup")["clip_norm"] == 1.0
