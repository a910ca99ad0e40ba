"""What precision.py prints, kept beside the time that each formula takes."""

import functools

import precision
import pytest
from timing import Measured, interleaved, report


@functools.cache
def measured(dtypes):
    tensors = precision.batch(*dtypes)
    ways = {name: functools.partial(formula, *tensors) for name, formula in precision.FORMULAS.items()}
    times, (policy, other) = interleaved(ways, rounds=5), map(precision.name, dtypes)
    return {
        name: Measured(
            f"{policy} policy, {other} reference and target",
            name,
            times[name],
            name == "polydpo_fast",
            facts={"policy": policy, "other": other, **precision.survival(formula, tensors)},
        )
        for name, formula in precision.FORMULAS.items()
    }


@pytest.mark.parametrize("dtypes", precision.DTYPES, ids=str)
@pytest.mark.parametrize("formula", precision.FORMULAS)
def test_precision(benchmark, dtypes, formula):
    report(benchmark, measured(dtypes)[formula])
