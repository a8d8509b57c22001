#!/usr/bin/env python3
"""Build NPU kernels: xclbin, control code and manifest, into the folder where the runtime looks for them.

    python kernels/build.py gemm --target npu1 --k 1152 --n 1536
    python kernels/build.py attention --target npu1 --head-dim 256
    python kernels/build.py model ~/models/gemma-3-1b-it --target npu1     every kernel that the model needs
    python kernels/build.py wrapper                                        C interface of XRT for any Python
    python kernels/build.py list  ~/models/gemma-3-1b-it --target npu1     the same, and build nothing

Runs in an IRON environment (mlir-aie with Peano, see docs/npu.md); needs no torch. `--host-model` builds for the
emulator instead, with g++ alone. What this script builds for hardware has never run on any.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import types
from pathlib import Path

KERNELS = Path(__file__).resolve().parent


def _without_torch() -> None:
    """Make the few modules that are needed importable without running the package, which imports torch."""
    for name in ("unicorn_backend", "unicorn_backend.runtime", "unicorn_backend.runtime.npu"):
        module = types.ModuleType(name)
        module.__path__ = [str(KERNELS.parent.joinpath(*name.split(".")))]
        sys.modules.setdefault(name, module)


if __name__ == "__main__":
    _without_torch()

from unicorn_backend.runtime.npu import artifacts, wanted  # noqa: E402
from unicorn_backend.runtime.npu.designs import GENERATIONS, Design, Gemm, IllegalDesign, key  # noqa: E402

TRIPLES = {20: "aie2-none-unknown-elf", 21: "aie2p-none-unknown-elf"}


class BuildError(Exception):
    """A tool is missing or failed."""


def build(design: Design, root: Path) -> artifacts.Artifact:
    """Build `design` with mlir-aie and Peano."""
    tools = _tools()
    built = f"mlir-aie {importlib.metadata.version('mlir_aie')}, never run on silicon"
    return artifacts.write(root, design, built, lambda folder: _compile(design, folder, *tools))


def build_host_model(design: Design, root: Path) -> artifacts.Artifact:
    """Build `design` for the emulator, which looks in a folder of its own."""
    from unicorn_backend.runtime.npu import host_model

    return host_model.build(design, root / artifacts.EMULATED)


def build_wrapper(root: Path) -> Path:
    """Build the C wrapper over libxrt."""
    root.mkdir(parents=True, exist_ok=True)
    target = root / "libunicorn_xrt.so"
    command = [os.environ.get("CXX", "g++"), "-std=c++17", "-O2", "-shared", "-fPIC"]
    xrt = os.environ.get("XILINX_XRT")
    command += [f"-I{xrt}/include", f"-L{xrt}/lib"] if xrt else []
    _run([*command, str(KERNELS / "xrt" / "wrapper.cpp"), "-lxrt_coreutil", "-o", str(target)], root)
    return target


def _tools() -> tuple[Path, Path]:
    """Folders of mlir-aie and of Peano."""
    if importlib.util.find_spec("aie") is None:
        raise BuildError("no module 'aie': this is no IRON environment. docs/npu.md has the steps to make one")
    peano = os.environ.get("PEANO_INSTALL_DIR") or _package_folder("llvm-aie")
    if peano is None or not (Path(peano) / "bin" / "clang++").is_file():
        raise BuildError("no Peano compiler: pip install llvm-aie, or set PEANO_INSTALL_DIR (docs/npu.md)")
    if shutil.which("aiecc.py") is None or shutil.which("xclbinutil") is None:
        raise BuildError("aiecc.py and xclbinutil must be in PATH: mlir-aie has the first, XRT the second")
    return Path(_package_folder("mlir_aie") or os.environ["MLIR_AIE_INSTALL_DIR"]), Path(peano)


def _package_folder(name: str) -> str | None:
    found = importlib.util.find_spec(name)
    return found.submodule_search_locations[0] if found and found.submodule_search_locations else None


def _compile(design: Design, folder: Path, mlir_aie: Path, peano: Path) -> None:
    sys.path.insert(0, str(KERNELS / "designs"))
    binary = folder / "kernels.o"
    defines = [f"-D{name}={value}" for name, value in design.defines.items()]
    triple = TRIPLES[design.generation.architecture]
    command = [str(peano / "bin" / "clang++"), "-O2", "-std=c++20", f"--target={triple}", "-DNDEBUG"]
    command += [f"-I{mlir_aie / 'include'}", *defines, "-c", str(KERNELS / "aie" / f"{design.kind}.cc")]
    _run([*command, "-o", str(binary)], folder)
    module = importlib.import_module(design.kind).program(design, binary.name)
    (folder / "design.mlir").write_text(str(module))
    outputs = [f"--xclbin-name={artifacts.XCLBIN}", f"--npu-insts-name={artifacts.INSTRUCTIONS}"]
    command = ["aiecc.py", "--aie-generate-xclbin", "--aie-generate-npu-insts", "--no-compile-host", *outputs]
    _run([*command, "--no-xchesscc", "--no-xbridge", f"--peano={peano}", "design.mlir"], folder)
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)


def _run(command: list[str], folder: Path) -> None:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if done.returncode:
        raise BuildError(f"{' '.join(command)}\n{done.stdout}{done.stderr}")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    actions = parser.add_subparsers(dest="action", required=True)
    common = argparse.ArgumentParser(add_help=False)
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "unicorn_backend"
    root = Path(os.environ.get("UNICORN_NPU_KERNELS") or Path(os.environ.get("UNICORN_CACHE_DIR") or cache) / "npu")
    common.add_argument("--out", type=Path, default=root, help="default: %(default)s")
    kernel = argparse.ArgumentParser(add_help=False, parents=[common])
    kernel.add_argument("--target", choices=list(GENERATIONS), required=True)
    kernel.add_argument("--host-model", action="store_true", help="for the emulator; needs g++ only")
    actions.add_parser("wrapper", parents=[common], help="the C wrapper over libxrt")
    gemm = actions.add_parser("gemm", parents=[kernel], help="one projection")
    gemm.add_argument("--k", type=int, required=True)
    gemm.add_argument("--n", type=int, required=True)
    gemm.add_argument("--tile-m", type=int, default=Gemm.tile_m)
    attention = actions.add_parser("attention", parents=[kernel], help="attention of one head width")
    attention.add_argument("--head-dim", type=int, required=True)
    for name in ("model", "list"):
        model = actions.add_parser(name, parents=[kernel], help="all kernels of a model")
        model.add_argument("model", type=Path, help="folder with config.json")
    return parser.parse_args()


def designs_of(arguments: argparse.Namespace) -> list[Design]:
    if arguments.action == "gemm":
        return [Gemm(arguments.target, arguments.k, arguments.n, arguments.tile_m)]
    if arguments.action == "attention":
        return [wanted.attention(arguments.target, arguments.head_dim)]
    return wanted.of_model(json.loads((arguments.model / "config.json").read_text()), arguments.target)


def main() -> int:
    arguments = _arguments()
    try:
        if arguments.action == "wrapper":
            print(build_wrapper(arguments.out))
            return 0
        make = build_host_model if arguments.host_model else build
        for design in designs_of(arguments):
            print(key(design) if arguments.action == "list" else make(design, arguments.out).folder, flush=True)
    except (BuildError, IllegalDesign, OSError) as error:
        print(f"build.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
