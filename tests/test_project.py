"""What the project says in several places is the same in all of them."""

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from ntkbook.publish import citing, claims, launch, notebooks, pages, runner, scorecard
from ntkbook.publish.book import profile_parameters

ROOT = Path(__file__).parents[1]

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]


def test_environment_yml_is_in_step_with_pyproject():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text("utf8"))
    (pip,) = (entry["pip"] for entry in environment["dependencies"] if isinstance(entry, dict))
    assert sorted(pip) == sorted({*PROJECT["dependencies"], *EXTRAS["book"], *EXTRAS["test"]})
    assert f"python{PROJECT['requires-python']}" in environment["dependencies"]


def test_the_lock_pins_every_dependency_within_its_bounds():
    lines = [line for line in (ROOT / "requirements.lock").read_text("utf8").splitlines() if "==" in line]
    locked = [Requirement(line.split(" \\")[0]) for line in lines if not line.strip().startswith(("#", "-"))]
    for text in [*PROJECT["dependencies"], *EXTRAS["book"], *EXTRAS["test"]]:
        wanted = Requirement(text)
        pins = [pin for pin in locked if canonicalize_name(pin.name) == canonicalize_name(wanted.name)]
        assert pins, f"{text} is not in requirements.lock"
        for pin in pins:
            (version,) = (spec.version for spec in pin.specifier)
            assert wanted.specifier.contains(version), f"{pin} is outside {text}"


def test_importing_the_library_alone_is_light():
    code = "import sys, ntkbook; ntkbook.Linearization, ntkbook.NTKKernel, ntkbook.NTKGP; print(*sorted(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = {name.split(".")[0] for name in done.stdout.split()}
    assert not loaded & {"pandas", "matplotlib", "IPython", "jupyter_client", "papermill", "plotly", "typer", "sphinx"}
    assert not [name for name in done.stdout.split() if name.startswith(("ntkbook.publish", "ntkbook.experiments"))]


def test_the_command_line_answers_without_loading_torch():
    code = "import sys; import ntkbook.publish.cli; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_the_readme_carries_the_stored_claims():
    table = scorecard.README_TABLE.search((ROOT / "README.md").read_text("utf8"))
    assert table
    assert table.group(1).strip() == scorecard.as_markdown(scorecard.entries(ROOT)), (
        "README.md's table is not that of `ntkbook claims --markdown`: run `ntkbook claims --readme`"
    )


def test_the_readmes_picture_is_the_stored_one():
    (path,) = re.findall(r"!\[[^]]*\]\(([^)]+)\)", (ROOT / "README.md").read_text("utf8"))
    stored = scorecard.readme_picture(ROOT / "book" / "02_sinusoids.ipynb")
    assert (ROOT / path).read_text("utf8") == stored, "README.md's picture is old: run `ntkbook claims --readme`"


def test_the_readmes_examples_run():
    kernel, products = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text("utf8"), re.DOTALL)
    names: dict = {}
    exec(kernel, names)
    assert names["posterior"].mean.shape == (100,)
    assert (names["posterior"].variance >= 0).all()
    exec(products, names)
    assert names["posterior"].report.converged


def test_every_claim_belongs_to_a_chapter():
    chapters = runner.chapters(ROOT)
    for claim in claims.CLAIMS:
        assert claim.chapter in chapters, f"{claim.id} names {claim.chapter}, which is not in _toc.yml"
        assert re.fullmatch(r"[a-z0-9-]+", claim.id)
        assert not claim.id.endswith(("-record", "-verdict")), f"{claim.id} would hide another's stored values"
        assert not claim.id.startswith("data-")


@pytest.mark.parametrize("profile", ["quick", "gpu"])
def test_profiles_change_parameters_that_the_chapters_have(profile):
    from ntkbook.publish.parameters import check_parameters

    entries = yaml.safe_load((ROOT / "profiles" / f"{profile}.yml").read_text("utf8"))
    assert set(entries) == set(runner.chapters(ROOT))
    for chapter in entries:
        nb = notebooks.from_text(ROOT / "book" / f"{chapter}.md")
        check_parameters(nb, profile_parameters(ROOT, profile, chapter), chapter)


@pytest.mark.parametrize("params", ["data_dir: '/my data/x'", 'names: ["a b", c]', "$(echo x); `echo y` # \\ *", ""])
@pytest.mark.parametrize("how", ["argument", "environment"])
def test_make_hands_parameters_on_as_they_are(tmp_path, params, how):
    """Dollars are doubled for make, as everywhere in what it is given."""
    told, program = tmp_path / "told", tmp_path / "ntkbook"
    program.write_text(f'#!/bin/sh\nprintf "%s\\n" "$@" > {told}\n', "utf8")
    program.chmod(0o755)
    (tmp_path / "stamp").touch()
    given = {"CHAPTER": "03 04*", "PROFILE": "a 'b", "PARAMS": params.replace("$", "$$")}
    command = ["make", "-C", str(ROOT), f"NTKBOOK={program}", f"STAMP={tmp_path / 'stamp'}"]
    arguments = [f"{key}={value}" for key, value in given.items()] if how == "argument" else []
    environment = {**os.environ, **(given if how == "environment" else {})}
    subprocess.run([*command, "run", *arguments], check=True, env=environment, capture_output=True)
    expected = ["run", "03", "04*", "--profile", "a 'b", "--params", params]
    assert told.read_text("utf8").split("\n")[:-1] == expected
    subprocess.run([*command, "store", *arguments], check=True, env=environment, capture_output=True)
    assert told.read_text("utf8").split() == ["store", "03", "04*"]


def test_every_mention_of_the_repository_is_that_of_the_configuration():
    url = yaml.safe_load((ROOT / "_config.yml").read_text("utf8"))["repository"]["url"]
    book = pages.pages_url(url)
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text("utf8"))
    assert PROJECT["urls"] == {"Repository": url, "Book": book}
    assert (citation["repository-code"], citation["url"]) == (url, book)
    folders = ("", ".ci", ".github/workflows", "book", "launch/book", "ntkbook", "ntkbook/publish", "profiles")
    paths = [path for folder in folders for path in (ROOT / folder).iterdir() if path.is_file()]
    name = url.rpartition("/")[2]
    mentions = {
        (str(path.relative_to(ROOT)), found)
        for path in paths
        if path.suffix in {".md", ".ipynb", ".yml", ".py", ".toml", ".cff", ""}
        for found in re.findall(
            rf"https://github\.com/[\w-]+/{name}\b|https://[\w-]+\.github\.io/{name}/?", path.read_text("utf8")
        )
    }
    assert {found for _, found in mentions} == {url, book}, mentions
    assert not {path for path, _ in mentions if path.endswith(".py")}, "code reads it from _config.yml"
    assert {"README.md", "CITATION.cff", "pyproject.toml", "_config.yml", "book/cite.md"} <= {
        path for path, _ in mentions
    }


def test_the_notebooks_for_colab_and_binder_are_those_of_the_chapters():
    chapters = runner.chapters(ROOT)
    assert sorted(path.stem for path in (ROOT / "launch" / "book").iterdir()) == sorted(chapters)
    for chapter in chapters:
        stored = notebooks.read(launch.path(ROOT, chapter))
        assert stored == launch.notebook(ROOT, chapter), f"launch/ is old: run `ntkbook launch` ({chapter})"


def test_the_page_on_citing_says_what_the_project_says():
    page = (ROOT / "book" / "cite.md").read_text("utf8")
    assert citing.with_sections(page, citing.sections(ROOT)) == page, "book/cite.md is old: run `ntkbook cite --write`"
