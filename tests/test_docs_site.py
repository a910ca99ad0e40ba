"""The pages of the documentation: their code runs, their tables are the code's, their links lead somewhere."""

import ast
import graphlib
import importlib
import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import PIL.Image
import pytest
import torch
import typer
from typer.testing import CliRunner

import polydpo_fast
from polydpo_fast.cli import app
from polydpo_fast.objectives import OBJECTIVES

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))


def blocks(page, language):
    return re.findall(rf"```{language}\n(.*?)```", (DOCS / f"{page}.md").read_text(), re.DOTALL)


def words(block):
    """Of each command in a block of shell."""
    lines = block.replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


# ------------------------------------------------------------------------------------------------ what runs


@pytest.mark.parametrize("page", ["start", "loss", "decoding", "contributing"])
def test_the_code_of_a_page_runs(page, tmp_path, monkeypatch):
    """All its blocks of Python, from top to bottom, as one program. Clips are smaller ones."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("POLYDPO_FAST_CACHE", str(tmp_path / "cache"))
    code = "\n".join(blocks(page, "python"))
    if page == "decoding":
        pytest.importorskip("av")
        from clip_oracle import encode

        for name in "abcd":
            (tmp_path / f"{name}.mp4").write_bytes(encode(count=12))
        assert code.count("frames=81, size=(720, 1280)") == 1
        code = code.replace("frames=81, size=(720, 1280)", "frames=5, size=(24, 32)")
    scope = {"__name__": page}
    exec(compile(code, f"{page}.md", "exec"), scope)
    for name, shape in {"start": {"batch": (8, 3, 256, 256)}, "decoding": {"pixels": (4, 3, 480, 640)}}.get(
        page, {}
    ).items():
        value = scope[name]
        assert getattr(value, "pixels", value).shape == shape
    if page == "loss":
        assert scope["halves"] == scope["apart"] == scope["interleaved"] != scope["masked"]
        assert scope["cached"].item() == pytest.approx(scope["halves"].item(), rel=1e-5)


def test_the_code_of_the_readme_runs(tmp_path, monkeypatch):
    """All its blocks of Python, in their order, on what a script has at hand: images, a manifest, a tiny pipeline."""
    pytest.importorskip("av")
    diffusers, peft = pytest.importorskip("diffusers"), pytest.importorskip("peft")
    from clip_oracle import encode
    from diffusion import pipelines

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("POLYDPO_FAST_CACHE", str(tmp_path / "cache"))
    text = (ROOT / "README.md").read_text()
    code = "\n".join(re.findall(r"```python\n(.*?)```", text, re.DOTALL))
    (line,) = (json.loads(line) for line in re.findall(r"```json\n(.*?)```", text, re.DOTALL))
    (tmp_path / "a").mkdir()
    for arm in ("win", "lose"):
        PIL.Image.new("RGB", (80, 64), "red").save(tmp_path / line[arm])
    (tmp_path / "pairs.jsonl").write_text(json.dumps(line) + "\n")
    smaller = {
        "size=1024": "size=16",
        "frames=81, size=(720, 1280)": "frames=5, size=(24, 32)",
        "size=512": "size=16",
        '"pickapic_v2/data/train-*.parquet", 8': '"pairs.jsonl", 1',
    }
    for old, new in smaller.items():
        assert code.count(old) == 1, old
        code = code.replace(old, new)
    # The images before the loop over the loader are a batch of one pair, of the same bytes; and the clips, of two.
    win_bytes, lose_bytes = ([(tmp_path / line[arm]).read_bytes()] for arm in ("win", "lose"))
    pipe = diffusers.DiffusionPipeline.from_pretrained(pipelines.save("sd15", tmp_path))
    pipe.unet.requires_grad_(False)
    pipe.unet.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q", "to_v"]))
    scope = {
        "torch": torch,
        "model_pred": torch.randn(4, 4, 8, 8, requires_grad=True),
        **{name: torch.randn(4, 4, 8, 8) for name in ("ref_pred", "target")},
        **{"win_bytes": win_bytes, "lose_bytes": lose_bytes, "pair_ids": [7]},
        **{"win": [encode(count=12)], "lose": [encode(count=12)]},
        **{"vae": pipe.vae, "unet": pipe.unet, "scheduler": pipe.scheduler},
        "encode": lambda pixels: pipe.vae.encode(pixels.float()).latent_dist.sample(),
        "embed": lambda prompts: torch.cat([pipe.encode_prompt(prompt, "cpu", 1, False)[0] for prompt in prompts] * 2),
    }
    exec(compile(code, "README.md", "exec"), scope)
    assert scope["latents"].shape[0] == 2
    assert scope["batch"].prompts == [line["prompt"]]
    assert scope["loss"].isfinite()
    assert any(p.grad is not None for p in pipe.unet.parameters())


def test_the_first_training_runs(tmp_path, monkeypatch):
    """The command of the page, on its pairs; of a model with a few thousand weights, in float32."""
    pytest.importorskip("diffusers")
    from diffusion import pipelines

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("POLYDPO_FAST_CACHE", str(tmp_path / "cache"))
    (pairs,) = (block for block in blocks("start", "python") if "write_text" in block)
    exec(compile(pairs, "start.md", "exec"), {})
    (command,) = (
        line for block in blocks("start", "sh") for line in words(block) if line[:2] == ["polydpo-fast", "train"]
    )
    given = dict(zip(command[2::2], command[3::2], strict=True))
    small = {
        "--model": str(pipelines.save("sd15", tmp_path)),
        "--mixed-precision": "no",
        "--steps": "2",
        "--size": "16",
    }
    assert set(small) - {"--size"} <= set(given)
    options = [word for item in {**given, **small}.items() for word in item]
    result = CliRunner().invoke(app, ["train", *options])
    assert result.exit_code == 0, result.output
    assert (tmp_path / "first-run" / "metrics.jsonl").exists()
    assert list((tmp_path / "first-run").glob("*lora*.safetensors"))


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.stem)
def test_commands_and_their_options_exist(page):
    commands = typer.main.get_command(app).commands
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    text = page.read_text()
    inline = re.findall(r"(?<!`)`((?:make|polydpo-fast)\s[^`]+)`(?!`)", text)
    code = re.findall(r"```sh\n(.*?)```", text, re.DOTALL) + [" ".join(part.split()) for part in inline]
    for line in (line for block in code for line in words(block)):
        if line[0] == "make":
            assert line[1] in targets, line
        elif line[0] == "polydpo-fast":
            known = {option for parameter in commands[line[1]].params for option in parameter.opts}
            assert {word for word in line if word.startswith("--")} <= known, line


# -------------------------------------------------------------------------------------------- what is the code's


def test_the_table_of_objectives_is_the_code_s():
    text = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", (DOCS / "loss.md").read_text())
    rows = re.findall(r'^\| `"(\w+)"` \| `(.*?)` \| `(.*?)` \| (.*?) \|$', text, re.MULTILINE)
    assert rows == [(name, one.formula, one.slope, one.source) for name, one in OBJECTIVES.items()]


def rows(text):
    """Of tables, their cells."""
    return [[cell.strip(" `") for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]


def test_the_messages_that_are_explained_are_the_code_s():
    code = "\n".join(path.read_text() for path in (ROOT / "polydpo_fast").rglob("*.py"))
    (section,) = (DOCS / "questions.md").read_text().split("## It says ...")[1:]
    messages = [row[0] for row in rows(section)[2:]]
    assert len(messages) > 5
    for message in messages:
        assert message in code or message == "out of memory", message  # which is PyTorch's


def test_options_of_diffusers_scripts_are_those_that_the_command_answers_with():
    """Each row's last word of theirs is answered with what stands beside it."""
    (section,) = (DOCS / "questions.md").read_text().split("| Diffusers' scripts |")[1:]
    known = {name for one in typer.main.get_command(app).commands["train"].params for name in one.opts}
    found = 0
    for theirs, ours in (line.split("|")[1:3] for line in section.split("\n\n")[0].splitlines()[2:]):
        expected = re.findall("`([^`]*)`", ours)
        assert {word.split()[0] for word in expected} <= known
        for option in re.findall("`(--[^`]*)`", theirs):
            if option == "--validation_steps":  # a setting of another meaning
                continue
            message = CliRunner().invoke(app, ["train", option]).output
            assert message.removeprefix(f"{option}: no option; expected ").strip() in expected, message
            found += 1
    assert found > 20


def test_the_answers_with_code_compute_what_they_say(tmp_path):
    """Your own DataLoader, with workers; and a loss of KTO's form, whose gradient is that of the formula in float64."""
    _, _, collate, kto, _ = blocks("questions", "python")
    file = tmp_path / "a.jpg"
    PIL.Image.new("RGB", (40, 30), (200, 30, 30)).save(file)
    data = [{"win": file.read_bytes(), "lose": file.read_bytes(), "prompt": str(i), "index": i} for i in range(16)]
    assert collate.count("size=1024") == 1
    scope = {"torch": torch, "polydpo_fast": polydpo_fast, "dataset": data}
    exec(compile(collate.replace("size=1024", "size=16"), "questions.md", "exec"), scope)
    batches = list(scope["loader"])
    assert [tuple(batch["pixels"].shape) for batch in batches] == [(16, 3, 16, 16)] * 2
    assert sorted(prompt for batch in batches for prompt in batch["prompts"]) == sorted(map(str, range(16)))

    target, ref = torch.randn(2, 6, 4, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    pred = (0.9 * ref + 0.1 * target).requires_grad_()
    scope |= {"model_pred": pred, "ref_pred": ref, "target": target, "beta": 3.0}
    exec(compile(kto, "questions.md", "exec"), scope)
    reward = -1.5 * ((pred - target) ** 2 - (ref - target) ** 2).mean(dim=(1, 2, 3))
    baseline = max(reward.mean().item(), 0)
    loss = torch.sigmoid(baseline - reward[:3]).mean() + torch.sigmoid(reward[3:] - baseline).mean()
    torch.testing.assert_close(scope["loss"], loss)
    torch.testing.assert_close(*(torch.autograd.grad(one, pred)[0] for one in (scope["loss"], loss)))


def test_batches_of_several_shapes_take_turns_and_go_on(tmp_path, monkeypatch):
    """The lines of the page: each epoch has every pair once, each batch is of one shape, also from the middle."""
    from polydpo_fast.data import PairLoader

    monkeypatch.chdir(tmp_path)
    (code,) = (block for block in blocks("data", "python") if "def batches" in block)
    large, small = "[(1024, 1024), (832, 1216), (1216, 832)]", [(16, 16), (8, 24), (24, 8)]
    assert code.count(large) == code.count(", 8, size") == 1
    PIL.Image.new("RGB", (24, 24)).save("a.png")
    prompts = {size: [f"{size} {i}" for i in range(4 + 2 * k)] for k, size in enumerate(small)}
    for (height, width), those in prompts.items():
        lines = (json.dumps({"win": "a.png", "lose": "a.png", "prompt": prompt}) for prompt in those)
        Path(f"pairs-{height}x{width}.jsonl").write_text("\n".join(lines))

    def scope():
        found = {"PairLoader": PairLoader}
        exec(compile(code.replace(large, str(small)).replace(", 8, size", ", 2, size"), "data.md", "exec"), found)
        return found

    def seen(batches):
        found = [(tuple(batch.pixels.shape[2:]), batch.prompts) for batch in batches]
        assert all(f"{size} " in prompt for size, those in found for prompt in those)
        return found

    whole = scope()
    epochs = [seen(whole["batches"](epoch)) for epoch in (0, 1)]
    every = sorted(prompt for those in prompts.values() for prompt in those)
    for epoch in epochs:
        assert sorted(prompt for _, those in epoch for prompt in those) == every
    assert [size for size, _ in epochs[0]] != [size for size, _ in epochs[1]]
    stopped = scope()
    running = stopped["batches"](1)
    begun = seen(next(running) for _ in range(4))
    resumed = scope()
    for old, new in zip(stopped["loaders"], resumed["loaders"], strict=True):
        new.load_state_dict(old.state_dict())
    assert begun + seen(resumed["batches"](1, done=4)) == epochs[1]


def test_the_bytes_of_a_training_add_up():
    table = {row[0]: row[1:] for row in rows((DOCS / "questions.md").read_text())}
    ways = {name: sum(int(cell or 0) for cell in row[:4]) for name, row in table.items() if row[-1].isdecimal()}
    assert ways == {name: int(table[name][-1]) for name in ways}
    whole, _, least, lora = ways.values()
    models = [row for row in table.values() if len(row) == 5 and re.fullmatch(r"\d+\.\d+", row[0])]
    assert len(models) == 5
    for weights, *gigabytes, _ in (map(float, row) for row in models):
        assert gigabytes == pytest.approx([weights * each for each in (whole, least, lora)], abs=0.051)


def test_the_readme_has_the_extras_of_the_package():
    """Those for users."""
    text = (ROOT / "pyproject.toml").read_text().split("[project.optional-dependencies]")[1].split("\n[")[0]
    extras = set(re.findall(r"^(\w+) = \[", text, re.MULTILINE))
    told = {row[0] for row in rows((ROOT / "README.md").read_text().split("| extra | for |")[1].split("\n\n")[0])[1:]}
    assert told == extras - {"bench", "docs", "dev"}


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="asks git")
def test_the_source_distribution_has_what_git_has():
    manifest = re.findall(r"^(?:include|graft) (.*)$", (ROOT / "MANIFEST.in").read_text(), re.MULTILINE)
    by_itself = {"LICENSE", "MANIFEST.in", "README.md", "pyproject.toml", "setup.py", "kernels", "polydpo_fast"}
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    there = {file.partition("/")[0] for file in files} - {".ci", ".github"}
    assert there - by_itself == {name for line in manifest for name in line.split()}


@pytest.mark.parametrize("package", ["", ".data", ".diffusion", ".check"])
def test_every_public_name_has_its_place_in_the_reference(package):
    module = importlib.import_module(f"polydpo_fast{package}")
    shown = set(re.findall(r"^::: (\S+)$", "\n".join(page.read_text() for page in DOCS.glob("api/*.md")), re.MULTILINE))
    assert {f"polydpo_fast{package}.{name}" for name in module.__all__ if name != "__version__"} <= shown


def test_imports_point_one_way_as_the_page_for_contributors_says():
    needs = {}
    for file in (ROOT / "polydpo_fast").rglob("*.py"):
        module = file.relative_to(ROOT).with_suffix("").parts
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and node.level:
                base = module[: -node.level]
                names = [node.module] if node.module else [alias.name for alias in node.names]
                needs.setdefault(module[1], set()).update([*base, *name.split(".")][1] for name in names)
    loss = {"objectives", "metrics", "layout", "reference", "fused", "functional"}
    decoders = {"limits", "decoding", "decode", "clips", "video", "cache"}
    assert needs["video"] == {"limits", "cache", "video"}
    assert needs["reference"] == {"layout", "metrics", "objectives"}
    alone = {"objectives", "metrics", "layout", "colour", "buffers", "splitmix", "values", "backends", "atomic"}
    assert not {*alone, "argument_checks"} & set(needs)
    for module in loss:
        assert needs.get(module, set()) <= loss | {"_C", "backends", "buffers", "argument_checks", "values"}, module
    assert needs["yuv"] == {"argument_checks", "backends", "colour", "kernels"}
    for module in [*decoders, "data"]:
        assert not needs.get(module, set()) & {*loss, "diffusion", "check"}, module
    for module in set(needs) - {"check", "demo", "bench", "comparison", "cli", "__main__"}:
        assert not needs[module] & {"check", "demo", "bench", "comparison"}, module


@pytest.mark.parametrize("package", ["fused", "decoding", "video", "data/formats", "data/dali"])
def test_imports_within_a_package_point_one_way(package):
    needs = {}
    for file in (ROOT / "polydpo_fast" / package).glob("*.py"):
        found = [node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.ImportFrom)]
        found = [[node.module] if node.module else [a.name for a in node.names] for node in found if node.level == 1]
        needs[file.stem] = {name for names in found for name in names}
    assert any(needs.values())
    list(graphlib.TopologicalSorter(needs).static_order())  # raises where there is a circle
    if package == "video":  # which has no use for a module that its face does not need
        assert {name for names in needs.values() for name in names} == set(needs) - {"__init__"}


# ------------------------------------------------------------------------------------------------- the site


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    pytest.importorskip("mkdocstrings")
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        # Not --quiet: warnings that are not shown are not counted by --strict.
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return {path.relative_to(folder).as_posix(): path.read_text() for path in folder.rglob("*.html")}


def test_no_page_fetches_anything_from_elsewhere(site):
    assert len(site) > 10
    for name, html in site.items():
        assert not re.findall(r"<(?:script|img|iframe)[^>]*\ssrc=\"(?:https?:)?//[^\"]*", html), name
        assert not re.findall(r"<link[^>]*rel=\"(?:stylesheet|preconnect)\"[^>]*href=\"(?:https?:)?//[^\"]*", html), (
            name
        )


def test_formulas_are_mathml(site):
    page = site["loss.html"]
    assert page.count("<math") == page.count("</math>") > 30
    article = re.sub(
        r"<(code|pre)\b.*?</\1>", "", page[page.index("<article") : page.index("</article>")], flags=re.DOTALL
    )
    assert "arithmatex" not in article
    assert "\\" not in article


def test_arguments_and_attributes_are_listed(site):
    """One of each kind of docstring: a section of Google's, lines of names, and a table."""
    loss, data = site["api/loss.html"], site["api/data.html"]
    assert re.search(r"<code>label_smoothing</code>.{1,400}the share of labels believed wrong", loss, re.DOTALL)
    assert re.search(r"<li>\s*(<p>)?<code>original_size</code>, <code>crop_top_left</code>: \(2B, 2\) int64", data)
    assert re.search(r"<pre.{1,200}KEY\.win\.EXT, KEY\.lose\.EXT", data, re.DOTALL)


def test_prose_of_docstrings_is_left_alone():
    pytest.importorskip("griffe")
    spec = importlib.util.spec_from_file_location("docs_docstrings", ROOT / "scripts" / "docs_docstrings.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for text in (
        "It is moved to the\ndevice: PNG too.",
        "Args:\n    device: where.\n        more",
        "    device: code",
        "other: of no parameter",
    ):
        assert module.as_markdown(text, {"device"}) == text
    assert module.as_markdown("device: where.\n    more\nother text", {"device"}) == (
        "- `device`: where.\n    more\n    other text"
    )
