import subprocess
import sys

import pytest
from typer.testing import CliRunner

import polydpo_fast
from polydpo_fast.cli import app

runner = CliRunner()


def test_info_names_versions_backends_and_codecs():
    result = runner.invoke(app, ["info"])
    assert result.exit_code == 0
    for text in (polydpo_fast.__version__, "torch", "reference", "libjpeg", "libdeflate", "SIMD level", "processors"):
        assert text in result.stdout


def test_no_arguments_show_the_commands():
    result = runner.invoke(app, [])
    assert "demo" in result.output
    assert "info" in result.output


@pytest.mark.parametrize("option", [["--beta", "-1"], ["--label-noise", "0.9"], ["--steps", "0"]])
def test_demo_refuses_bad_options(option):
    result = runner.invoke(app, ["demo", *option])
    assert result.exit_code == 2
    assert option[0] in result.output


def test_importing_the_library_is_light():
    """Neither Triton nor the demo's packages are loaded before they are used."""
    code = "import sys, polydpo_fast; print([m for m in ('triton', 'diffusers', 'pyarrow', 'PIL') if m in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    import_of_torch = subprocess.run(
        [sys.executable, "-c", code.replace("polydpo_fast;", "torch;")], capture_output=True, text=True, check=True
    ).stdout
    assert found == import_of_torch
