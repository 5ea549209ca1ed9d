"""The benchmark of augmentation runs and tells a figure of each method."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.augment import CHEAP, main
from engine.data.augment.wordnet import FOLDER
from tests.predict.models import some_texts, write_model


@pytest.mark.skipif(not FOLDER.is_dir(), reason="WordNet isn't installed (Debian's wordnet-base)")
def test_every_method_has_its_figures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = write_model(tmp_path / "model", "MaskedLM", ("a", "b"))
    rows = [{"sentence": text, "label": 0} for text in some_texts(80) if text.strip()]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = [f"--data={tmp_path / 'data.jsonl'}", f"--model={model}", f"--masked={model}", "--count=64"]
    monkeypatch.setattr("sys.argv", ["augment", *arguments])
    main()
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("{")]  # transformers talks too
    found = {row["method"]: row for row in map(json.loads, lines)}
    assert set(found) == {"mlm", *CHEAP}
    assert all(row["examples_per_s"] > 0 for row in found.values())
    assert all(found[name]["augmented_ms_a_batch"] > found[name]["plain_ms_a_batch"] > 0 for name in CHEAP)
