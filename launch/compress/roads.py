"""Makes candidates: pruned models and distilled students, each as a graph in fp32 and in int8.

What is made stays in a folder beside the output, so that a command that was killed makes only what is missing.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from engine.compress.road import Wish
from engine.durable import write_atomically
from engine.errors import RunError, UserError
from launch.compress.options import CompressConfig
from launch.seeds.running import SCRIPT

if TYPE_CHECKING:
    from engine.compress.prune.prune import Evidence
    from engine.compress.score import Score
    from engine.predict.model import ModelFolder
    from engine.tasks.finetune import FineTuning

#: in the folder of candidates: what they were made of and how
RECORD = "made_of.json"
#: points that an int8 model may lose at least, though its float model lost all that may be lost
LEAST_POINTS = 0.1


@dataclass(frozen=True)
class Made:
    """A graph and its score."""

    name: str
    folder: Path
    score: Score


class Roads:
    """The candidates of one model."""

    def __init__(
        self,
        given: str,
        model: ModelFolder,
        task: FineTuning,
        config: CompressConfig,
        wish: Wish,
        room: Path,
        training: list[str],
        tell: Callable[[str], None],
    ) -> None:
        """
        Args:
            given: what the user names the model by.
            room: the folder of candidates.
            training: options of `zerobert train` for students.

        Raises:
            UserError: the folder holds candidates of another model, or made otherwise.
        """
        self.given, self.model, self.task, self.config, self.wish = given, model, task, config, wish
        self.room, self.training, self.tell = room, training, tell
        self.began = time.monotonic()
        self.left_out: list[str] = []
        self._evidence: Evidence | None = None
        self._claim()

    def _claim(self) -> None:
        made_of = {"model": self.model.fingerprint(), "training": self.training}
        made_of |= {name: asdict(self.config)[name] for name in ("samples", "calibration", "threads")}
        path = self.room / RECORD
        if path.is_file() and json.loads(path.read_text(encoding="utf-8")) != made_of:
            raise UserError(f"output: {self.room} holds candidates of another model or other options; remove it")
        self.room.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps(made_of) + "\n")

    def make(self, before: Score) -> Iterator[Made]:
        """Every candidate with its score, until the time is over.

        Args:
            before: of the model itself.
        """
        from engine.compress.score import change

        for name, weights in self._weights():
            if time.monotonic() - self.began > 60 * self.config.minutes:
                self.left_out.append(f"{name}: --minutes {self.config.minutes:g} are over")
                continue
            try:
                fp32 = self._scored(name, self._graph(name, weights))
            except (RunError, UserError) as error:  # such as a speed that is out of reach
                self.left_out.append(f"{name}: {error}")
                continue
            yield fp32
            left = self.wish.points + 100 * change(before, fp32.score).value
            yield self._int8(name, fp32, max(left, LEAST_POINTS))

    def _weights(self) -> Iterator[tuple[str, Callable[[], Path]]]:
        """Names of models, and what makes the folder of each."""
        yield "whole", lambda: self.model.folder
        for speed in self.config.pruned:
            yield f"pruned {speed:g}x", lambda speed=speed: self._pruned(speed)  # type: ignore[misc]
        for layers in self.config.distilled:
            yield f"{layers} layers, distilled", lambda layers=layers: self._student(layers)  # type: ignore[misc]

    def _pruned(self, speed: float) -> Path:
        from engine.compress.folder import open_source
        from engine.compress.prune.compact import compact
        from engine.compress.prune.latency import Load
        from engine.compress.prune.prune import Options, examine, prune
        from engine.compress.prune.target import Target

        folder = self.room / f"pruned-{speed:g}x"
        if not folder.is_dir():
            source = open_source(str(self.model.folder))
            model = source.load()
            length = min(Load.length, self.model.length(None))
            load = Load(length=length, threads=self.config.threads)
            options = Options(Target("speed", speed), self.config.samples, load=load)
            self._evidence = self._evidence or examine(self.task, model, options)
            pruned = prune(self.task, model, options, self._evidence)
            compact(pruned.model)
            source.write(pruned.model, folder, {"pruned": {"target": str(options.target)}})
        return folder

    def _student(self, layers: int) -> Path:
        from engine.compress.prune.layers import spread

        folder, log = self.room / f"student-{layers}", self.room / f"student-{layers}.log"
        kept = ",".join(map(str, spread(layers, self.model.config.num_hidden_layers)))
        command = [
            sys.executable, SCRIPT, "--config", str(Path(self.given) / "config.yaml"), "--adapter.method=none",
            "--train.freeze=null", f"--model.init_from={self.model.folder}", f"--model.init_layers={kept}",
            f"--distil.teachers={self.model.folder}", "--distil.hard=1.0", *self.training, f"--output={folder}",
            "--resume=auto",
        ]  # fmt: skip
        self.tell(f"distilling {layers} layers; what it says is in {log}")
        with log.open("a", encoding="utf-8") as file:
            done = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, check=False)
        if done.returncode:
            said = log.read_text(encoding="utf-8").strip().splitlines()
            raise RunError(f"its training ended with {done.returncode}: {said[-1] if said else log}")
        return folder / "export"

    def _graph(self, name: str, weights: Callable[[], Path]) -> Path:
        from engine.export import source_of
        from engine.onnx.folder import GraphWish, export_graph
        from engine.predict.model import open_folder

        folder = self.room / f"{_slug(name)}-fp32"
        if not folder.is_dir():
            export_graph(source_of(open_folder(str(weights()))), folder, GraphWish())
        return folder

    def _int8(self, name: str, fp32: Made, points: float) -> Made:
        from engine.compress.quantise.options import QuantiseConfig
        from engine.compress.quantise.quantise import quantise
        from engine.predict.model import open_folder

        folder, name = self.room / f"{_slug(name)}-int8", f"{name}, int8"
        if folder.is_dir():
            return self._scored(name, folder)
        options = QuantiseConfig(
            "dynamic",
            min(points, 100.0),
            certain=False,
            samples=self.config.calibration,
            threads=self.config.threads,
        )
        report = quantise(open_folder(str(fp32.folder)), folder, self.task, options, lambda line: None, fp32.score)
        return self._told(Made(name, folder, report.chosen.score))

    def _scored(self, name: str, folder: Path) -> Made:
        import torch

        from engine.compress.score import score
        from engine.predict.model import open_folder

        module = open_folder(str(folder)).load(torch.device("cpu"), "fp32")
        return self._told(Made(name, folder, score(self.task, module)))

    def _told(self, made: Made) -> Made:
        self.tell(f"{made.name}: {made.score.metric} {made.score.value:.4f}")
        return made


def _slug(name: str) -> str:
    return name.replace(",", "").replace(" ", "-")
