import dataclasses
import re
import runpy
import subprocess
import sys

import pytest
import typer
from typer.testing import CliRunner

import polydpo_fast
from polydpo_fast.cli import app
from polydpo_fast.diffusion.config import Settings

runner = CliRunner()


def test_info_names_versions_backends_and_codecs():
    result = runner.invoke(app, ["info"])
    assert result.exit_code == 0
    for text in (polydpo_fast.__version__, "torch", "reference", "libjpeg", "libdeflate", "SIMD level", "processors"):
        assert text in result.stdout


def test_the_version_is_told():
    result = runner.invoke(app, ["--version"])
    assert (result.exit_code, result.output) == (0, f"{polydpo_fast.__version__}\n")


def test_no_arguments_show_the_commands(monkeypatch):
    """And whole sentences of what they do."""
    monkeypatch.setenv("COLUMNS", "80")
    told = runner.invoke(app, []).output
    for name in typer.main.get_command(app).commands:
        assert re.search(rf"(?m)^  {name} +[A-Z].*[^.]\.$", told), name


def test_the_module_is_the_command(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["cli", "check", "--bogus"])
    with pytest.raises(SystemExit, match="2"):
        runpy.run_module("polydpo_fast", run_name="__main__")


@pytest.mark.parametrize("option", [["--beta", "-1"], ["--label-noise", "0.9"], ["--steps", "0"]])
def test_demo_refuses_bad_options(option):
    result = runner.invoke(app, ["demo", *option])
    assert result.exit_code == 2
    assert option[0] in result.output


def test_the_demo_says_in_a_line_that_it_cannot_write(tmp_path):
    (tmp_path / "file").write_text("")
    result = runner.invoke(app, ["demo", "--out", str(tmp_path / "file")])
    assert result.exit_code == 2
    assert result.output == f"{tmp_path / 'file'}: File exists\n"


def test_help_has_the_options_whole_in_a_narrow_terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    for name, command in typer.main.get_command(app).commands.items():
        told = runner.invoke(app, [name, "--help"]).output
        for option in command.params:
            for word in (*option.opts, *option.secondary_opts):
                assert re.search(rf"(?m)^  .*(?<![\w-]){re.escape(word)}(?![\w-])", told), (name, word)


def test_importing_the_library_is_light():
    """Neither Triton nor the demo's packages are loaded before they are used."""
    code = "import sys, polydpo_fast; print([m for m in ('triton', 'diffusers', 'pyarrow', 'PIL') if m in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    import_of_torch = subprocess.run(
        [sys.executable, "-c", code.replace("polydpo_fast;", "torch;")], capture_output=True, text=True, check=True
    ).stdout
    assert found == import_of_torch


def test_the_defaults_in_the_help_of_train_are_those_of_its_settings():
    """The options have None, so that a file of settings can say otherwise: the help repeats what holds then."""
    options = {option.name: option.help or "" for option in typer.main.get_command(app).commands["train"].params}
    told = {name: found[1] for name, text in options.items() if (found := re.search(r"\(default ([^:()]+)\)", text))}
    defaults = {one.name: one.default for one in dataclasses.fields(Settings)}
    assert {"steps", "alpha", "batch_size", "lora_rank", "objective"} <= set(told)
    for name, text in told.items():
        value = "off" if defaults[name] is False else defaults[name]
        assert text == str(value) or float(text) == value, name


def test_what_settings_mean_to_a_command_is_in_its_help():
    """`reference` trains nothing. And what every call needs is shown before the command's own options."""
    commands = typer.main.get_command(app).commands
    helps = {name: {one.name: one.help for one in command.params} for name, command in commands.items()}
    assert helps["reference"]["lora_rank"] == "The --lora-rank that the training will have (default 0)."
    assert "Train LoRA" in helps["train"]["lora_rank"]
    assert "made by `cache`" in helps["reference"]["data"]
    assert "made by `cache`" not in helps["cache"]["data"]  # which it refuses
    for name, own in (("cache", {"shard_pairs", "store"}), ("reference", {"shard_pairs", "draws"})):
        order = list(helps[name])
        assert order[:4] == ["out", "config", "model", "data"]
        assert set(order[-2:]) == own
