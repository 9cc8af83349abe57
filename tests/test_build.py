"""The build's own questions: instruction sets, weak symbols, and requests it must refuse."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from setuptools import Distribution

ROOT = Path(__file__).resolve().parents[1]


def build(**environment):
    return subprocess.run(
        [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )


@pytest.mark.skipif(torch.version.cuda is not None, reason="this torch can have CUDA kernels")
def test_a_build_asked_for_cuda_that_cannot_have_it_names_what_is_missing():
    result = build(SKINFAST_CUDA="ON")
    assert result.returncode != 0
    (line,) = result.stderr.splitlines()
    assert "SKINFAST_CUDA=ON needs a CUDA build of torch" in line


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"SKINFAST_CUDA": "MAYBE"}, "SKINFAST_CUDA is 'MAYBE'; it needs to be AUTO, ON or OFF"),
        ({"TORCH_CUDA_ARCH_LIST": "Hopper"}, "TORCH_CUDA_ARCH_LIST has 'Hopper'; it needs"),
        ({"CUTLASS_PATH": "/nowhere"}, "CUTLASS_PATH is '/nowhere'; it needs a folder with"),
    ],
)
def test_unusable_build_settings_are_refused_in_one_line(environment, message):
    result = build(**environment)
    assert result.returncode != 0
    (line,) = result.stderr.splitlines()
    assert message in line


@pytest.fixture
def setup(monkeypatch):
    """The module of setup.py, without its call of setup."""
    monkeypatch.setattr("setuptools.setup", lambda **arguments: None)
    spec = importlib.util.spec_from_file_location("skinfast_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("usual", [True, False])
def test_cmake_is_told_of_an_nvcc_that_is_not_on_path(setup, monkeypatch, tmp_path, usual):
    nvcc = tmp_path / "nvcc"
    if usual:
        nvcc.touch(0o755)
    commands = []
    monkeypatch.setattr(setup, "USUAL_NVCC", nvcc)
    monkeypatch.setattr(setup, "find_tool", lambda name: name)
    monkeypatch.setattr(setup.CMakeBuild, "call", staticmethod(commands.append))
    monkeypatch.setattr(
        setup.CMakeBuild, "get_ext_fullpath", lambda self, name: str(tmp_path / "x")
    )
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.delenv("CUDACXX", raising=False)
    setup.CMakeBuild(Distribution()).run()
    assert (f"-DCMAKE_CUDA_COMPILER={nvcc}" in commands[0]) == usual
    assert (setup.find_nvcc() is not None) == usual


@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512", "avx512_bf16", "amx_bf16"])
def test_every_instruction_set_gives_the_results_of_pytorch(isa):
    """Parity of all ops with the kernels of a lower instruction set, in a process of its own."""
    from skinfast import _host

    best = _host.cpu_instruction_set()
    sets = _host.build_info()["cpu_instruction_sets"].split()
    if isa not in sets or sets.index(isa) > sets.index(best):
        pytest.skip(f"this CPU runs {best}")
    program = (
        "import sys; from skinfast import _host; from skinfast._selfcheck import _check_ops;"
        f"assert _host.cpu_instruction_set() == {isa!r};"
        "sys.exit('; '.join(f'{c.subject}: {c.failure}' for c in _check_ops() if c.failure) or 0)"
    )
    result = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "SKINFAST_CPU_ISA": isa},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr


def test_kernels_of_one_instruction_set_share_no_inline_functions_with_another():
    """A weak symbol compiled for AVX-512 could be the copy that the linker keeps for all."""
    folders = sorted((ROOT / "build").glob("*/CMakeFiles/cpu_avx*"))
    if not folders:
        pytest.skip("no build folder here")
    for folder in folders:
        for file in folder.rglob("*.o"):
            symbols = subprocess.run(
                ["nm", "--demangle", file], capture_output=True, text=True, check=True
            ).stdout
            weak = [line for line in symbols.splitlines() if line[17:18] in "WVu"]
            assert not weak, f"{file.relative_to(ROOT)}: {weak[0]}"
