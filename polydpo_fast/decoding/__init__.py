"""What `decode_pairs` and `decode_clips` share.

`arguments` checks what was asked for, with `draws`: what is drawn for a pair. `pillow` reads the images that C++ does
not, and `frames` has C++ finish what FFmpeg decoded.
"""
