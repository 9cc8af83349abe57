"""Builds the C++/CUDA libraries with CMake and ninja; everything else is in pyproject.toml.

Environment: SKINFAST_CUDA=AUTO|ON|OFF, TORCH_CUDA_ARCH_LIST ("8.0;9.0a+PTX"), MAX_JOBS,
CUTLASS_PATH (a copy of CUTLASS; the package nvidia-cutlass is found by itself),
SKINFAST_STRICT=ON (warnings and register spills are errors).
"""

from __future__ import annotations

import os
import re
import shutil
import site
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
OLDEST_TORCH = (2, 10)
USUAL_NVCC = Path("/usr/local/cuda/bin/nvcc")
# What one nvcc and one g++ need at their peak, generously.
GIB_PER_CUDA_JOB = 3.0
GIB_PER_JOB = 1.0


def package_folders() -> list[Path]:
    """Where packages are installed, the environment's too in an isolated build."""
    return [Path(p) for p in (*sys.path, sysconfig.get_path("platlib"), *site.getsitepackages())]


def find_torch() -> Path | None:
    """The folder of an installed torch, without importing it.

    pip's isolated build environment hides the site-packages of the environment that it installs
    into. The headers and libraries of the torch found there serve as well as a fresh download of
    several gigabytes: the stable ABI makes the result independent of torch's version.
    """
    for folder in package_folders():
        torch = folder / "torch"
        if (torch / "version.py").is_file() and (torch / "include").is_dir():
            release = re.match(r"(\d+)\.(\d+)", torch_facts(torch)[0])
            if release and (int(release[1]), int(release[2])) >= OLDEST_TORCH:
                return torch
    return None


def torch_facts(torch: Path) -> tuple[str, str]:
    """Version of torch, and the CUDA version it was built for ("" for a CPU build)."""
    text = (torch / "version.py").read_text()
    version = re.search(r"__version__ = '([^']+)'", text)
    cuda = re.search(r"^cuda(?:: [^=]+)? = '([^']+)'", text, re.MULTILINE)
    return version[1] if version else "unknown", cuda[1] if cuda else ""


def find_cutlass() -> Path | None:
    """The folder of CUTLASS's headers: in CUTLASS_PATH, or of the package nvidia-cutlass."""
    version = Path("cutlass") / "version.h"
    if path := os.environ.get("CUTLASS_PATH"):
        include = Path(path).absolute() / "include"
        if not (include / version).is_file():
            raise SystemExit(
                f"skinfast: CUTLASS_PATH is {path!r}; it needs a folder with include/{version}"
            )
        return include
    for folder in package_folders():
        include = folder / "cutlass_library" / "source" / "include"
        if (include / version).is_file():
            return include.absolute()
    return None


def cuda_architectures(arch_list: str) -> str:
    """TORCH_CUDA_ARCH_LIST ("8.0;9.0a+PTX") as CMake's list ("80-real;90a-real;90a-virtual")."""
    architectures = []
    for item in re.split(r"[;, ]+", arch_list.strip()):
        match = re.fullmatch(r"(\d+)\.(\d+[af]?)(\+PTX)?", item)
        if not match:
            raise SystemExit(
                f"skinfast: TORCH_CUDA_ARCH_LIST has {item!r}; it needs entries like 8.0 or 9.0+PTX"
            )
        number = match[1] + match[2]
        architectures.append(f"{number}-real")
        if match[3]:
            architectures.append(f"{number}-virtual")
    return ";".join(architectures)


def jobs() -> tuple[int, int]:
    """Compilers at once, and how many of them nvcc: as many as cores and free memory allow."""
    match = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
    free_gib = int(match[1]) / 2**20 if match else 4.0
    wish = os.environ.get("MAX_JOBS") or str(os.cpu_count() or 1)
    if not wish.isdecimal() or int(wish) < 1:
        raise SystemExit(f"skinfast: MAX_JOBS is {wish!r}; it needs to be a number from 1")
    wanted = int(wish)
    at_once = max(1, min(wanted, int(free_gib / GIB_PER_JOB)))
    return at_once, max(1, min(at_once, int(free_gib / GIB_PER_CUDA_JOB)))


def find_nvcc() -> str | None:
    """nvcc in CUDACXX, on PATH or where the toolkit is usually installed."""
    nvcc = os.environ.get("CUDACXX") or shutil.which("nvcc") or str(USUAL_NVCC)
    return shutil.which(nvcc)


def cuda_wish(torch_version: str, torch_cuda: str) -> str:
    """SKINFAST_CUDA; a build that is asked for CUDA and cannot have it stops here."""
    wish = os.environ.get("SKINFAST_CUDA", "AUTO").upper()
    if wish not in ("AUTO", "ON", "OFF"):
        raise SystemExit(f"skinfast: SKINFAST_CUDA is {wish!r}; it needs to be AUTO, ON or OFF")
    if wish == "ON" and not torch_cuda:
        raise SystemExit(
            f"skinfast: SKINFAST_CUDA=ON needs a CUDA build of torch; {torch_version} has none"
        )
    if wish == "ON" and find_nvcc() is None:
        raise SystemExit("skinfast: SKINFAST_CUDA=ON needs nvcc; add its folder to PATH")
    return wish


def find_tool(name: str) -> str:
    """The tool beside this Python, which pip installed, rather than the system's older one."""
    tool = shutil.which(name, path=str(Path(sys.executable).parent)) or shutil.which(name)
    if tool is None:
        raise SystemExit(f"skinfast: {name} was not found; run `pip install {name}`, then again")
    return tool


class CMakeBuild(build_ext):
    """Configure, build and install CMakeLists.txt into the package folder."""

    def run(self) -> None:
        torch = find_torch()
        if torch is None:
            raise SystemExit(
                "skinfast: torch 2.10 or newer was not found; run `pip install --upgrade torch`"
            )
        version, cuda = torch_facts(torch)
        at_once, cuda_at_once = jobs()
        package = Path(self.get_ext_fullpath("skinfast._ops")).resolve().parent
        # One build folder for each torch and Python: a change of either must not meet old objects.
        strict = os.environ.get("SKINFAST_STRICT", "OFF").upper() == "ON"
        name = f"{version}-{sysconfig.get_python_version()}".replace("+", "-")
        name += "-strict" if strict else ""
        build = ROOT / "build" / name
        options = {
            "CMAKE_INSTALL_PREFIX": package,
            "SKINFAST_TORCH_DIR": torch,
            "SKINFAST_TORCH_VERSION": version,
            "SKINFAST_TORCH_CUDA": cuda,
            "SKINFAST_CUDA": cuda_wish(version, cuda),
            "SKINFAST_CUDA_JOBS": cuda_at_once,
            "SKINFAST_CUTLASS_DIR": find_cutlass() or "",
            "SKINFAST_STRICT": "ON" if strict else "OFF",
            "Python_EXECUTABLE": sys.executable,
            "CMAKE_MAKE_PROGRAM": find_tool("ninja"),
            "pybind11_DIR": self.pybind11_cmake_dir(),
        }
        if find_nvcc() == str(USUAL_NVCC):  # CMake looks for it on PATH alone
            options["CMAKE_CUDA_COMPILER"] = USUAL_NVCC
        if arch_list := os.environ.get("TORCH_CUDA_ARCH_LIST"):
            options["CMAKE_CUDA_ARCHITECTURES"] = cuda_architectures(arch_list)
        cmake = find_tool("cmake")
        configure = [cmake, "-S", str(ROOT), "-B", str(build), "-G", "Ninja"]
        self.call([*configure, *(f"-D{key}={value}" for key, value in options.items())])
        self.call([cmake, "--build", str(build), "--parallel", str(at_once)])
        self.call([cmake, "--install", str(build)])

    @staticmethod
    def pybind11_cmake_dir() -> str:
        import pybind11

        return pybind11.get_cmake_dir()

    @staticmethod
    def call(command: list[str]) -> None:
        try:
            subprocess.run(command, check=True)
        except subprocess.CalledProcessError as error:
            raise SystemExit(
                f"skinfast: the build stopped; see the message above ({error})"
            ) from None


setup(
    # Two outputs of one CMake run; no sources, so that setuptools leaves the compiling to it.
    # Optional, for it is left out where there are no Python headers.
    ext_modules=[Extension("skinfast._host", sources=[], optional=True)],
    cmdclass={"build_ext": CMakeBuild},
    # pip asks for this (by egg_info) before an isolated build: torch is downloaded only where
    # there is none.
    setup_requires=["torch>=2.10"] if "egg_info" in sys.argv and not find_torch() else [],
)
