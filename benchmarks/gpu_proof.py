"""What this project does on a GPU, proven and measured on one in some eight minutes: `python -m benchmarks.gpu_proof`.

    python -m benchmarks.gpu_proof --budget 450            everything, under runs/proof
    python -m benchmarks.gpu_proof --only kernels losses   some stages
    python -m benchmarks.gpu_proof --device cpu            the same at toy sizes, to see that it runs

Each stage is a process with a limit of its own, a share of what the budget has left, so the first ones, which are
worth most, always run. One that fails, hangs or is ended doesn't end the rest, and what it had found is kept. Written
are proof.json after each stage, NAME.log with all that a stage printed, the picture proof.png and a trace. Keep
proof.json as benchmarks/results/CARD.json.

The stages train on text that ships with Python, and are held to the losses of a CPU. Both are made first, in some
minutes that the budget doesn't count, unless --materials names a folder that has them: `make gpu-kit` makes a folder
with them, this tree and what it needs beside PyTorch and transformers, for a machine without a network.

Exit code 0 if all stages ran and met their goals, 1 if one failed, was ended or missed a goal, 2 for a wrong option.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from benchmarks.common import ROOT, emit
from benchmarks.proof import materials
from benchmarks.proof.picture import draw
from benchmarks.proof.runner import DOCUMENT, run, summary
from benchmarks.proof.stage import STAGES


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    stages = "\n".join(f"  {name:<12} {stage.what}" for name, stage in STAGES.items())
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=f"stages, in order:\n{stages}", formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--budget", type=float, default=450.0, help="seconds for all stages (default 450)")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="cpu: toy sizes (default cuda)")
    parser.add_argument("--only", nargs="+", choices=list(STAGES), metavar="STAGE", help="stages to run; all without")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "proof", help="folder of results (runs/proof)")
    parser.add_argument("--materials", type=Path, help="a folder that has them (default: made under --out)")
    args = parser.parse_args(arguments)
    if not args.budget > 0:
        parser.error(f"--budget: {args.budget:g} is not a positive number of seconds")
    if args.out.exists() and not args.out.is_dir():
        parser.error(f"--out: {str(args.out)!r} is a file; give a folder")
    if args.materials is not None and not (args.materials / materials.REFERENCES).is_file():
        parser.error(
            f"--materials: {str(args.materials)!r} has no {materials.REFERENCES}; leave it out to have it made"
        )
    if args.device == "cuda" and not has_gpu():
        parser.error("--device: torch sees no GPU here; give --device cpu for toy sizes")
    args.out = args.out.absolute()  # stages run in another folder
    args.only = [name for name in STAGES if args.only is None or name in args.only]
    return args


def has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def made(given: argparse.Namespace) -> Path:
    """The folder of materials; made where none is given and none is left from an earlier call."""
    if given.materials is not None:
        folder: Path = given.materials
        return folder
    toy = given.device == "cpu"
    folder = given.out / ("materials-toy" if toy else "materials")
    if not (folder / materials.REFERENCES).is_file():
        print(f"materials: a store and the losses of a CPU, under {folder} …", flush=True)
        materials.make(folder, materials.TOY if toy else materials.FULL)
    return folder


def main() -> int:
    given = parse()
    document = run(given.only, given.device, given.budget, made(given), given.out)
    for found in document["stages"].values():
        emit(found["rows"], as_json=False)
    print(f"\n{summary(document)}")
    drawn = draw(document, given.out)
    print(f"\nresults in {given.out / DOCUMENT}; {drawn}")
    return 0 if all(found["state"] in ("ok", "skipped") for found in document["stages"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())
