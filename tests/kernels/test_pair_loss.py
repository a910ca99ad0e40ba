"""Around a launch: how a sample is split."""

import pytest
from polydpo_fast.kernels import pair_loss


@pytest.mark.parametrize("numel", [1, 1023, 1024, 1025, 16_384, 2**20, 16 * 21 * 60 * 104, 16 * 21 * 90 * 160, 2**31])
def test_splits_cover_a_sample_and_few_are_left_to_the_last(numel):
    blocks = pair_loss.blocks_per_split(numel)
    splits = -(-numel // (blocks * pair_loss.BLOCK))
    assert splits * blocks * pair_loss.BLOCK >= numel
    assert (splits - 1) * blocks * pair_loss.BLOCK < numel
    if numel <= 2**25:  # each program reads 64 blocks at most
        assert splits <= 1.5 * pair_loss.LARGE_SPLITS  # at 1152 splits a program begins to read two blocks
    if numel >= 2**20:
        assert splits >= 512
