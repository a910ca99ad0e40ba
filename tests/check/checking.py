"""What tests of `polydpo-fast check` share."""

import pytest
from typer.testing import CliRunner

import polydpo_fast
from polydpo_fast.check import cases

runner = CliRunner()
needs_cpp = pytest.mark.skipif("cpp" not in polydpo_fast.available_backends("cpu"), reason="the extension is not built")
PLAIN = next(
    c.number
    for c in (cases.draw(0, number) for number in range(1000))
    if (c.edge, c.dtypes, c.kind, c.options["objective"]) == ("", "fp32", "own", "poly_dpo") and c.ref and c.pairs > 1
)
