"""The objects that the native library is linked from."""

import shutil
import subprocess
from collections import defaultdict

import pytest

from tests.conftest import ROOT


def test_kernels_of_two_instruction_sets_share_no_weak_symbol() -> None:
    """The linker keeps one of two weak definitions: a template of the standard library that one file compiled for AVX-512 would
    then run on a machine that has AVX2 only.
    """
    nm = shutil.which("nm")
    objects = sorted(ROOT.glob("build/*/CMakeFiles/qwenkit_cpu.dir/**/*.o"))
    names = {path.name.split(".")[0] for path in objects}
    if nm is None or not names >= {"kernels_avx2", "kernels_avx512"}:
        pytest.skip("needs nm and the objects of an editable install")
    defined = defaultdict(set)
    for path in objects:
        listing = subprocess.run([nm, "--defined-only", path], check=True, capture_output=True, text=True).stdout
        symbols = [line.split()[-2:] for line in listing.splitlines() if line.strip()]
        assert symbols, path
        for kind, symbol in symbols:
            if kind in "WwVvu":
                defined[symbol].add(path.name)
    kernels = {path.name for path in objects if path.name.startswith("kernels_")}
    shared = {symbol: sorted(files) for symbol, files in defined.items() if len(files) > 1 and files & kernels}
    assert not shared
