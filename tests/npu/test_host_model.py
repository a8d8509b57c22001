"""The host model of aie_api: rounding, saturation, wrap-around, traps, and what must not compile."""

from __future__ import annotations

import ctypes
import math
import subprocess
import sys
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import pytest

from unicorn_backend.runtime.npu.artifacts import KERNELS

PROBE = """
#include <aie_api/aie.hpp>
extern "C" {
int32 srs(int64_t v, unsigned shift, unsigned rounding, unsigned saturation, unsigned bits) {
  aie::set_rounding(aie::rounding_mode(rounding));
  aie::set_saturation(aie::saturation_mode(saturation));
  aie::accum<acc64, 16> a;
  a.d[3] = v;
  if (bits == 8) return a.to_vector<int8>(shift)[3];
  if (bits == 9) return a.to_vector<uint8>(shift)[3];
  if (bits == 16) return a.to_vector<int16>(shift)[3];
  return a.to_vector<int32>(shift)[3];
}
int64_t add(int64_t a, int64_t b, unsigned wide) {
  if (wide) {
    aie::accum<acc64, 16> x;
    x.d[0] = a;
    return aie::mac(x, aie::broadcast<int32, 16>(int32(b)), aie::broadcast<int16, 16>(1)).d[0];
  }
  aie::accum<acc32, 16> x;
  x.d[0] = int32(a);
  return aie::mac(x, aie::broadcast<int16, 16>(int16(b)), aie::broadcast<int16, 16>(1)).d[0];
}
int32 product(int32 start) {
  aie::mmul<4, 8, 8, int8, int8, acc32> c(aie::broadcast<int32, 32>(start));
  c.mac(aie::broadcast<int8, 32>(127), aie::broadcast<int8, 64>(127));
  return c.to_vector<int32>()[31];
}
int load(const int8* p, unsigned bytes) { return bytes == 64 ? aie::load_v<64>(p)[0] : aie::load_v<16>(p)[0]; }
unsigned power_up() { return unsigned(aie::model::rounding) * 16 + unsigned(aie::model::saturation); }
}
"""

# mode -> the integer for an exact fraction
ROUND: tuple[Callable[[Fraction], int], ...] = (
    math.floor,
    math.ceil,
    lambda x: math.floor(x + Fraction(1, 2)),
    lambda x: math.ceil(x - Fraction(1, 2)),
    lambda x: math.floor(abs(x) + Fraction(1, 2)) * (1 if x > 0 else -1),
    lambda x: math.ceil(abs(x) - Fraction(1, 2)) * (1 if x > 0 else -1),
    round,
    lambda x: round(x) if x.denominator != 2 else 2 * math.floor(x / 2) + 1,
    math.trunc,
    lambda x: math.ceil(abs(x)) * (1 if x > 0 else -1),
)
RANGE = {8: (-128, 127), 9: (0, 255), 16: (-(2**15), 2**15 - 1), 32: (-(2**31), 2**31 - 1)}


def compile_probe(folder: Path, source: str, architecture: int = 20) -> subprocess.CompletedProcess[str]:
    path = folder / "probe.cc"
    path.write_text(source)
    command = ["g++", "-std=c++20", "-O1", "-shared", "-fPIC", f"-I{KERNELS / 'host'}", str(path)]
    return subprocess.run(
        [*command, f"-D__AIE_ARCH__={architecture}", "-o", str(path.with_suffix(".so"))], capture_output=True, text=True
    )


@pytest.fixture(scope="module")
def probe(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    folder = tmp_path_factory.mktemp("probe")
    done = compile_probe(folder, PROBE)
    assert done.returncode == 0, done.stderr
    library = ctypes.CDLL(str(folder / "probe.so"))
    library.add.restype = ctypes.c_int64
    return library


@pytest.mark.parametrize("mode", range(10))
def test_rounding_and_saturation(probe: ctypes.CDLL, mode: int) -> None:
    """Every mode against exact fractions: ties, signs, and both ends of every destination."""
    values = [*range(-40, 41), 2**40 + 3, -(2**40) - 3, 2**31 - 1, -(2**31), 2**31, 32767 * 8 + 4, -32768 * 8 - 4, 1020]
    for v in values:
        for shift in (0, 1, 2, 3, 31):
            exact = ROUND[mode](Fraction(v, 2**shift))
            for bits, (lo, hi) in RANGE.items():
                for saturation in range(3):
                    low = -hi if saturation == 2 and lo else lo
                    wrapped = (exact - lo) % (hi - lo + 1) + lo
                    want = wrapped if saturation == 0 else min(max(exact, low), hi)
                    got = probe.srs(ctypes.c_int64(v), shift, mode, saturation, bits)
                    assert got == want, (v, shift, bits, saturation)


def test_accumulators_wrap_at_their_width(probe: ctypes.CDLL) -> None:
    def add(a: int, b: int, wide: int) -> int:
        return int(probe.add(ctypes.c_int64(a), ctypes.c_int64(b), wide))

    assert add(2**31 - 1, 1, 0) == -(2**31)
    assert add(2**31 - 1, 1, 1) == 2**31
    assert add(2**63 - 1, 1, 1) == -(2**63)
    assert ctypes.c_int32(probe.product(2**31 - 1)).value == 2**31 - 1 + 8 * 127 * 127 - 2**32


def test_power_up_state(probe: ctypes.CDLL) -> None:
    """A core starts rounding down and wrapping: a kernel that forgets to set its modes must fail here too."""
    code = f"import ctypes; print(ctypes.CDLL({probe._name!r}).power_up())"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "0"


@pytest.mark.parametrize(
    ("bytes_", "offset", "traps"), [(64, 0, False), (64, 32, False), (64, 16, True), (16, 8, True)]
)
def test_misaligned_access_traps(probe: ctypes.CDLL, bytes_: int, offset: int, traps: bool) -> None:
    code = (
        "import ctypes, mmap; b = mmap.mmap(-1, 4096); p = ctypes.addressof(ctypes.c_char.from_buffer(b));"
        f"ctypes.CDLL({probe._name!r}).load(ctypes.c_void_p(p + {offset}), {bytes_})"
    )
    assert (subprocess.run([sys.executable, "-c", code]).returncode < 0) == traps


@pytest.mark.parametrize(
    "code",
    [
        "aie::vector<int32, 6> x;",
        "aie::vector<int16, 128> x;",
        "aie::mmul<3, 8, 8, int8, int8, acc32> x;",
        "aie::mmul<4, 8, 8, int16, int8, acc32> x;",
        "auto x = aie::add(aie::zeros<int32, 64>(), aie::zeros<int32, 64>());",
        "auto x = aie::mul<acc32>(aie::zeros<int32, 16>(), aie::zeros<int16, 16>());",
        "auto x = aie::add(aie::zeros<int32, 16>(), aie::zeros<int16, 16>());",
    ],
)
def test_what_the_cores_do_not_have_does_not_compile(tmp_path: Path, code: str) -> None:
    body = "#include <aie_api/aie.hpp>\nvoid f() {{ {} (void)x; }}"
    assert compile_probe(tmp_path, body.format("auto x = aie::zeros<int32, 16>();")).returncode == 0
    failed = compile_probe(tmp_path, body.format(code))
    assert failed.returncode != 0 and "error" in failed.stderr


@pytest.mark.parametrize("define", ["", "-D__AIE_ARCH__=10"])
def test_other_architectures_are_refused(define: str) -> None:
    command = ["g++", "-std=c++20", "-fsyntax-only", f"-I{KERNELS / 'host'}", "-DUNICORN_M=32", "-DUNICORN_K=64"]
    done = subprocess.run(
        [*command, "-DUNICORN_N=32", *([define] if define else []), str(KERNELS / "aie" / "gemm_i8.cc")],
        capture_output=True,
        text=True,
    )
    assert done.returncode != 0 and "AIE2" in done.stderr
