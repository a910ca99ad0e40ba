"""`decode_pairs` and `decode_clips` by NVIDIA DALI: the class of `decoder`, with `images` and `clips` behind it."""
