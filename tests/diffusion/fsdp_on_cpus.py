"""`polydpo-fast` with Accelerate's FSDP, which it takes GPUs to be needed for: on CPUs, by torchrun."""

import sys

from accelerate.state import PartialState
from accelerate.utils import DistributedType

if __name__ == "__main__":
    PartialState(cpu=True).distributed_type = DistributedType.MULTI_GPU
    from polydpo_fast.cli import app

    app(sys.argv[1:])
