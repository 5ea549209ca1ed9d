"""Until its first step is done, a run imports what it uses and nothing else."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from engine.zero.quiet import without_compiler
from tests.conftest import ROOT
from tests.train.certificate.first_step_worker import MARK
from tests.train.runs import SMALL, environment

#: each takes from a tenth of a second to two seconds to import, and only evaluations, exports or preparation use it
LATER = {
    "datasets",
    "matplotlib",
    "pandas",
    "scipy",
    "sentencex",
    "sklearn",
    "tensorflow",
    "torch._inductor.compile_fx",
    "transformers.activations",
    "transformers.modeling_utils",
    "transformers.tokenization_utils_base",
}
USED = {"deepspeed", "pyarrow", "tensorboard", "tokenizers", "transformers.models.bert.configuration_bert"}


def loaded_after_the_first_step(output: Path, *options: str) -> set[str]:
    command = [
        sys.executable,
        "-m",
        "tests.train.certificate.first_step_worker",
        f"--output={output}",
        *SMALL,
        *options,
    ]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    printed = done.stdout.splitlines()
    return set(printed[printed.index(MARK) + 1 :])


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 0])
def test_a_pre_training_rank_imports_only_what_it_uses(store: Path, tmp_path: Path, stage: int) -> None:
    loaded = loaded_after_the_first_step(tmp_path / "run", f"--data.path={store}", f"--train.zero_stage={stage}")
    assert loaded >= USED
    assert loaded & LATER == set()


def test_a_classifier_imports_its_metrics_when_it_evaluates() -> None:
    code = "import sys, engine.tasks.sequence; print(*sys.modules, sep='\\n')"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    loaded = set(done.stdout.splitlines())
    assert "engine.tasks.report" in loaded
    assert loaded & LATER == set()


@pytest.mark.parametrize("before", [None, "0", "1"])
def test_the_compiler_is_off_inside_only(monkeypatch: pytest.MonkeyPatch, before: str | None) -> None:
    monkeypatch.delenv("TORCHDYNAMO_DISABLE", raising=False)
    if before is not None:
        monkeypatch.setenv("TORCHDYNAMO_DISABLE", before)
    with without_compiler():
        assert os.environ["TORCHDYNAMO_DISABLE"] == "1"
    assert os.environ.get("TORCHDYNAMO_DISABLE") == before
