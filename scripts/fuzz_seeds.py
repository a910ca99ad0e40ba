"""Small images of every kind as a fuzzer's seeds: python scripts/fuzz_seeds.py DIRECTORY"""

import io
import sys
from pathlib import Path

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

OPTIONS = bytes([30, 30, 1, 1, 7, 0, 0, 1])  # what csrc/fuzz/decode.cpp takes its options from

EXIF = b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x06\0\0\0\0\0\0\0"

directory = Path(sys.argv[1])
directory.mkdir(parents=True, exist_ok=True)
image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (19, 23, 3), dtype=np.uint8))
texts = PngInfo()
texts.add_text("Raw profile type exif", f"\nexif\n      32\n{EXIF.hex()}\n", zip=True)
kinds = [
    ("JPEG", "RGB", {"subsampling": 2}),
    ("JPEG", "RGB", {"subsampling": 1, "restart_marker_blocks": 1}),
    ("JPEG", "RGB", {"subsampling": 0, "optimize": True}),
    ("JPEG", "RGB", {"keep_rgb": True}),
    ("JPEG", "RGB", {"progressive": True}),
    ("JPEG", "RGB", {"progressive": True, "subsampling": 1, "restart_marker_blocks": 2}),
    ("JPEG", "L", {"progressive": True}),
    ("JPEG", "L", {}),
    ("JPEG", "CMYK", {}),
    ("JPEG", "RGB", {"exif": EXIF}),
    ("PNG", "L", {"pnginfo": texts}),
    *(("PNG", mode, {}) for mode in ("1", "L", "LA", "P", "RGB", "RGBA")),
]
for number, (kind, mode, options) in enumerate(kinds):
    file = io.BytesIO()
    image.convert(mode).save(file, kind, **options)
    (directory / f"{number}").write_bytes(OPTIONS + file.getvalue())
    (directory / f"{number}-bare").write_bytes(file.getvalue())
