"""One folder that proves and measures this project on a GPU machine without a network: `make gpu-kit`.

    python -m benchmarks.proof.kit                         build/gpu-kit, for Python 3.12 on x86-64
    python -m benchmarks.proof.kit --python-version 3.11   for another Python
    python -m benchmarks.proof.kit --also einops ninja     with more wheels

In it are the committed tree, wheels of what a machine with PyTorch and transformers still lacks, the materials of
`benchmarks.gpu_proof` (a store, labelled paragraphs, a start model, a CPU's losses) and run.sh, which installs the
wheels beside them and runs it: `./run.sh`, with any option of that command. Making it needs a network for the wheels,
and some two minutes of a CPU for the losses. It is refused above a size, so that it can be sent along.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks.all import provenance
from benchmarks.common import ROOT
from benchmarks.proof import materials

#: what is brought along as wheels from the package index: ours, those of DeepSpeed and jsonargparse, and a peer
WHEELS = (
    "pydantic", "pydantic-core", "annotated-types", "typing-inspection", "typing-extensions", "hjson",
    "jsonargparse", "docstring-parser", "typeshed-client", "shtab", "sentencex", "liger-kernel",
)  # fmt: skip
#: of which the index has sources only: their wheel, which holds Python alone, is built here
BUILT = ("deepspeed",)
#: requirements that a machine for training has, and those that no stage needs: datasets reads what prepare is given
EXPECTED = (
    "torch", "transformers", "huggingface_hub", "mpi4py", "tensorboard", "tokenizers", "safetensors", "scikit-learn",
    "matplotlib", "numpy", "pyarrow", "PyYAML", "tqdm",
)  # fmt: skip
UNNEEDED = ("datasets",)
#: tags of wheels for Linux on x86-64, whose libraries are at most those of 2018
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64", "manylinux1_x86_64")
MIB = 1 << 20
PROVENANCE = "kit.json"
SCRIPT = """#!/bin/sh
cd "$(dirname "$0")" || exit
[ -d site ] || python3 -m pip install -q --no-index --no-deps --target site wheels/*.whl || exit
PYTHONPATH="$PWD/site:$PWD/zerobert" exec python3 -m benchmarks.gpu_proof --materials materials --out results "$@"
"""


def pinned(name: str) -> str:
    """A requirement of the version that is installed here, so that the kit has what was tested; any where none is."""
    try:
        return f"{name}=={importlib.metadata.version(name)}"
    except importlib.metadata.PackageNotFoundError:
        return name


def pip(*arguments: str) -> None:
    """Run pip.

    Raises:
        SystemExit: it failed; with its last lines.
    """
    done = subprocess.run([sys.executable, "-m", "pip", *arguments], capture_output=True, text=True)
    if done.returncode:
        sys.exit("pip failed; a kit needs the package index once:\n" + "\n".join(done.stderr.splitlines()[-5:]))


def bring_wheels(folder: Path, python: str, also: Sequence[str]) -> None:
    """Fill a folder with wheels for a Python version such as 3.12."""
    target = [f"--python-version={python}", "--implementation=cp", *(f"--platform={name}" for name in PLATFORMS)]
    names = [pinned(name) for name in (*WHEELS, *also)]
    pip("download", "-q", "--no-deps", "--only-binary=:all:", *target, "-d", str(folder), *names)
    os.environ["DS_BUILD_OPS"] = "0"
    # Without isolation the build finds the torch that is installed here, and needs no other.
    pip("wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(folder), *map(pinned, BUILT))


def bring_tree(folder: Path) -> None:
    """Unpack the last commit."""
    archive = subprocess.run(["git", "archive", "HEAD"], cwd=ROOT, check=True, capture_output=True).stdout
    with tarfile.open(fileobj=io.BytesIO(archive)) as packed:
        if hasattr(tarfile, "data_filter"):  # not before Python 3.10.12 and 3.11.4; our own archive needs none
            packed.extraction_filter = tarfile.data_filter
        packed.extractall(folder)


def size(folder: Path) -> int:
    """Bytes of all files in a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def make(folder: Path, python: str, also: Sequence[str], scale: materials.Scale) -> None:
    """Fill an empty folder."""
    bring_tree(folder / "zerobert")
    (folder / "wheels").mkdir()
    bring_wheels(folder / "wheels", python, also)
    materials.make(folder / "materials", scale)
    facts = provenance() | {"python": python, "wheels": sorted(path.name for path in (folder / "wheels").iterdir())}
    (folder / "materials" / PROVENANCE).write_text(json.dumps(facts, indent=1) + "\n")
    (folder / "run.sh").write_text(SCRIPT)
    (folder / "run.sh").chmod(0o755)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=ROOT / "build" / "gpu-kit", help="folder (build/gpu-kit)")
    parser.add_argument("--python-version", default="3.12", help="of the GPU machine's python3 (default 3.12)")
    parser.add_argument("--also", nargs="+", default=[], metavar="NAME", help="more packages to bring as wheels")
    parser.add_argument("--limit", type=float, default=60.0, metavar="MIB", help="largest size (default 60 MiB)")
    parser.add_argument("--toy", action="store_true", help="losses of toy sizes, for run.sh --device cpu")
    args = parser.parse_args(arguments)
    args.output = args.output.absolute()
    if args.output.exists() and not is_kit(args.output) and (args.output.is_file() or any(args.output.iterdir())):
        parser.error(f"--output: {str(args.output)!r} is there and is no kit; give another folder")
    return args


def is_kit(folder: Path) -> bool:
    return (folder / "run.sh").is_file() and (folder / "zerobert").is_dir()


def main() -> int:
    given = parse()
    shutil.rmtree(given.output, ignore_errors=True)
    given.output.mkdir(parents=True)
    make(given.output, given.python_version, given.also, materials.TOY if given.toy else materials.FULL)
    parts = {path.name: size(path) if path.is_dir() else path.stat().st_size for path in sorted(given.output.iterdir())}
    for name, bytes_ in parts.items():
        print(f"{name:<10} {bytes_ / MIB:>7.1f} MiB")
    total = sum(parts.values()) / MIB
    if "modified" in provenance()["commit"]:
        print("note: the kit has the last commit, without what is changed in this tree since")
    if total > given.limit:
        sys.exit(f"{given.output} has {total:.1f} MiB, above the limit of {given.limit:g}; raise --limit to keep it so")
    print(f"{given.output}: {total:.1f} MiB; on the GPU machine: ./run.sh, whose results are in results/")
    return 0


if __name__ == "__main__":
    sys.exit(main())
