"""`polydpo-fast` with Accelerate's FSDP or DeepSpeed, which it takes GPUs to be needed for: on CPUs, by torchrun."""

import os
import sys

from accelerate.state import PartialState
from accelerate.utils import DistributedType

if __name__ == "__main__":
    PartialState(cpu=True).distributed_type = DistributedType.MULTI_GPU
    if "ACCELERATE_USE_DEEPSPEED" in os.environ:
        import deepspeed.comm.torch

        # Else it compiles its own exchange of messages.
        sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None
        deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False)
    from polydpo_fast.cli import app

    app(sys.argv[1:])
