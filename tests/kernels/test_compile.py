"""Every CUDA kernel compiles for every GPU generation, without a GPU, and is kept and found again on disk."""

from __future__ import annotations

import functools
import multiprocessing
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from engine.errors import UserError
from engine.kernels.cuda import kernels as cuda
from engine.kernels.cuda import nvrtc
from engine.kernels.cuda.kernels import all_kernels
from engine.kernels.cuda.nvrtc import Compiled, Cubin, compile_kernels, cubin_of, file_name, find_cubin
from launch.__main__ import dispatch
from tests.kernels import compilers
from tests.kernels.resources import accesses, disassembler, machine_code, resources, table

ROOT = Path(__file__).resolve().parents[2]
ARCHITECTURES = (75, 80, 86, 90, 100, 120)
SMALL = "norm_of_chunks<1024>"


def why_no_compiler() -> str:
    """What of NVRTC can't be loaded here, or ""."""
    try:
        nvrtc.supported_architectures()
    except (UserError, RuntimeError) as error:
        return f"the CUDA kernels can't be compiled here: {error}"
    return ""


needs_nvrtc = pytest.mark.skipif(bool(why_no_compiler()), reason=why_no_compiler())


def one_of_each() -> list[str]:
    """The first instance of each kernel's template, which the fast suite compiles."""
    return list({name.split("<")[0]: name for name in reversed(all_kernels())}.values())


Names = Callable[[], list[str]]
KERNELS = (one_of_each, pytest.param(all_kernels, marks=pytest.mark.slow))
CASES = [
    *(pytest.param(one_of_each, arch, id=f"{arch}, one of each") for arch in (75, 90)),
    *(pytest.param(all_kernels, arch, id=str(arch), marks=pytest.mark.slow) for arch in ARCHITECTURES),
]


@functools.cache
def compiled(names: Names, arch: int) -> Compiled:
    """The kernels, compiled once for all tests."""
    return compile_kernels(names(), arch)


@needs_nvrtc
@pytest.mark.parametrize(("names", "arch"), CASES)
def test_every_kernel_compiles_and_spills_no_register(names: Names, arch: int) -> None:
    found = resources(compiled(names, arch))
    assert [row.kernel for row in found] == names()
    assert [row.kernel for row in found if row.spills or row.stack] == []
    for row in found:
        threads = int(row.kernel.rstrip(">").split(", ")[1]) if "xent" in row.kernel else 256
        assert 0 < row.registers * threads <= 65536, row


def check_another_compiler(version: str, architectures: list[int]) -> None:
    """Every kernel compiles there; a few bytes of spills of an older compiler in two kernels are let pass."""
    try:
        found = compilers.spills(version, architectures)
    except OSError as error:
        pytest.skip(f"NVRTC {version} isn't here: {error}")
    except subprocess.CalledProcessError as error:
        pytest.fail(f"NVRTC {version}: {[row for row in error.stderr.splitlines() if 'error' in row][:3]}")
    assert found.keys() >= set(architectures) and found  # noqa: PT018
    for arch, kernels in found.items():
        assert list(kernels) == all_kernels()
        spilled = {name: count for name, count in kernels.items() if count}
        tolerated = ("lamb_update", "xent_streaming") if version != compilers.INSTALLED else ()
        assert all(name.startswith(tolerated) and count <= 32 for name, count in spilled.items()), (arch, spilled)


@pytest.mark.slow
@needs_nvrtc
def test_every_kernel_compiles_with_the_oldest_compiler() -> None:
    check_another_compiler("12.6", [80])


@needs_nvrtc
@pytest.mark.slow
@pytest.mark.parametrize("version", [*compilers.WHEELS, compilers.INSTALLED])
def test_every_kernel_compiles_with_every_compiler_for_each_gpu_it_knows(version: str) -> None:
    check_another_compiler(version, [])


@needs_nvrtc
@pytest.mark.parametrize("names", KERNELS)
def test_rows_and_chunks_move_in_128_bit_units(names: Names) -> None:
    nvdisasm = disassembler()
    if nvdisasm is None:
        pytest.skip("nvdisasm is not installed: the machine code can't be read (pip install nvidia-cuda-nvdisasm)")
    sums = ("norm_of_chunks", "lamb_ratios", "lamb_squares", "sum_partials")
    moved = [name for name in names() if not name.startswith(sums)]
    code = machine_code(compiled(names, 90), nvdisasm)
    assert [name for name in moved if accesses(code[name], "LD") == 0] == []
    stored = [name for name in moved if not name.startswith(("squared_norms", "column_sum"))]
    assert [name for name in stored if accesses(code[name], "ST") == 0] == []


@needs_nvrtc
@pytest.mark.parametrize("names", KERNELS)
def test_the_table_has_a_line_for_every_kernel(names: Names) -> None:
    assert [line.split(">")[0] + ">" for line in table(compiled(names, 90), 90).splitlines()[1:]] == names()


@needs_nvrtc
def test_a_mistake_in_a_kernel_is_told_with_its_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvrtc, "PROGRAM", "#include <xent.cuh>\nint wrong = undefined;\n")
    with pytest.raises(Exception, match='identifier "undefined" is undefined'):
        compile_kernels(["xent_streaming<float, 256>"], 90)


def test_a_cache_file_holds_the_symbol_and_any_bytes() -> None:
    cubin = Cubin("_Z3fooi", b"\x7fELF\n\0\n")
    assert Cubin.from_bytes(cubin.to_bytes()) == cubin


def test_a_kernel_another_architecture_and_other_sources_have_other_files(monkeypatch: pytest.MonkeyPatch) -> None:
    names = {file_name("adamw<float, bf16, 256>", 80), file_name("adamw<float, fp16, 256>", 80)}
    names.add(file_name("adamw<float, bf16, 256>", 90))
    monkeypatch.setattr(nvrtc, "sources_digest", lambda: "other sources")
    names.add(file_name("adamw<float, bf16, 256>", 90))
    assert len(names) == 4


@needs_nvrtc
def test_a_kernel_is_compiled_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = cubin_of(SMALL, 90, tmp_path)
    monkeypatch.setattr(nvrtc, "compile_kernels", None)
    assert cubin_of(SMALL, 90, tmp_path) == first
    assert [path.name for path in tmp_path.iterdir()] == [file_name(SMALL, 90)]


@pytest.mark.slow
@needs_nvrtc
def test_ranks_that_start_together_share_one_cache(tmp_path: Path) -> None:
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        found = pool.starmap(cubin_of, [(SMALL, 90, tmp_path)] * 2)
    assert found == found[:1] * 2
    assert [path.name for path in tmp_path.iterdir()] == [file_name(SMALL, 90)]


def test_a_prebuilt_kernel_of_an_older_gpu_of_the_generation_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(nvrtc.PREBUILT, str(tmp_path))
    monkeypatch.setattr(nvrtc, "cubin_of", lambda kernel, arch, folder: Cubin(f"compiled for {arch}", b""))
    nvrtc.store(Cubin("for 80", b""), tmp_path / file_name(SMALL, 80))
    assert find_cubin(SMALL, (8, 6)).symbol == "for 80"
    assert find_cubin(SMALL, (9, 0)).symbol == "compiled for 90"
    assert find_cubin(SMALL, (7, 5)).symbol == "compiled for 75"


def test_without_cuda_core_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cuda.core", None)
    with pytest.raises(UserError, match=r"pip install 'zerobert\[cuda\d*\]'"):
        compile_kernels([SMALL], 90)


@pytest.mark.parametrize(("cuda_of_torch", "extra"), [("12.8", "cuda12"), ("13.0", "cuda13"), (None, "cuda")])
def test_the_extra_fits_torch(cuda_of_torch: str | None, extra: str) -> None:
    assert nvrtc.extra(cuda_of_torch) == extra
    assert f"\n{extra} = [" in (ROOT / "pyproject.toml").read_text()


def test_another_version_of_the_compiler_has_another_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    folders = set()
    for version in ("12.8", "13.0"):
        monkeypatch.setattr(nvrtc, "version", lambda version=version: version)
        folders.add(nvrtc.cubin_folder())
    assert len(folders) == 2


@needs_nvrtc
def test_build_kernels_fills_a_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    few = all_kernels()[:3]
    monkeypatch.setattr(cuda, "all_kernels", lambda: few)
    assert dispatch(["build-kernels", "--arch", "8.0", "--output", str(tmp_path)]) == 0
    assert {path.name for path in tmp_path.iterdir()} == {file_name(name, 80) for name in few}
    assert "sm_80: 3 kernels" in capsys.readouterr().out


@needs_nvrtc
@pytest.mark.parametrize("arch", ["x", "7", "sm_70", "333"])
def test_build_kernels_names_an_architecture_that_does_not_exist(arch: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"arch: .* (give one|it knows)"):
        dispatch(["build-kernels", "--arch", arch, "--output", str(tmp_path)])


def test_importing_the_kernels_imports_nothing_of_cuda() -> None:
    program = (
        "import sys, torch; before = set(sys.modules);"  # torch looks for cuda's bindings itself
        "import engine.kernels, engine.kernels.cuda.kernels, engine.kernels.cuda.nvrtc, engine.kernels.ops;"
        "print([name for name in set(sys.modules) - before if name.split('.')[0] in ('cuda', 'nvidia')])"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True, capture_output=True, text=True)
    assert done.stdout == "[]\n"
