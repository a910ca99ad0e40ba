"""PyAV's FFmpeg serves programs that look for FFmpeg by its usual names."""

import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

av = pytest.importorskip("av")
main = runpy.run_path(str(Path(__file__).parents[1] / "scripts" / "link_ffmpeg.py"))["main"]


def test_the_usual_names_load_what_pyav_has(tmp_path):
    if not (Path(av.__file__).parent.parent / "av.libs").exists():
        pytest.skip("PyAV was built here, against the system's FFmpeg")
    folder = tmp_path / "ffmpeg"
    main(folder)
    main(folder)  # again, as each run of the benchmarks does
    from av import library_versions

    version = library_versions["libavformat"]
    code = f"""
import ctypes
found = ctypes.CDLL("libavformat.so.{version[0]}").avformat_version()
assert (found >> 16, found >> 8 & 255, found & 255) == {version}, found
"""
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "LD_LIBRARY_PATH": str(folder)})
