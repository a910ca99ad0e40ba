"""Gives other packages PyAV's FFmpeg: `python scripts/link_ffmpeg.py FOLDER`, then LD_LIBRARY_PATH=FOLDER.

SPDL and torchcodec bring none, and look for libraries by their usual names. So the benchmarks compare them with ours on
the same build of the codecs.
"""

import re
import sys
from pathlib import Path

import av


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for link in filter(Path.is_symlink, folder.iterdir()):
        link.unlink()
    for library in (Path(av.__file__).parent.parent / "av.libs").iterdir():
        (folder / library.name).symlink_to(library)  # they need each other by the names of the wheel
        if usual := re.fullmatch(r"(lib(?:av|sw)[a-z]+)-[0-9a-f]+(\.so\.\d+)[.\d]*", library.name):
            (folder / (usual[1] + usual[2])).symlink_to(library)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
