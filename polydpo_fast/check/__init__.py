"""`polydpo-fast check`: is the library right on this machine? All is held against truths that share no code with it.

    python -m polydpo_fast.check [--thorough] [--device cuda] [--backend triton] [--seed 7] [--case 12]

`cases` draws what is tried, `exact` has the losses once more in float64, `losses` holds the backends against that;
`images` holds decoding against Pillow and `transform`, `clips` clips against PyAV, `planes` stored planes against the
matrices, `loading` the loader against its records, and all three what is drawn against `formulas`; `run` divides the
time among them, `report` gathers the worst of each kind. `encoding` writes images, `data` has what these parts share.
"""

from .report import Report
from .run import check

__all__ = ["Report", "check"]
