"""The command line, as a user meets it."""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict

import pytest

from ntkbook.experiments.data.sources import Provenance
from ntkbook.publish import notebooks
from ntkbook.publish.claims import CLAIMS
from ntkbook.publish.verdicts import make_record


def ntkbook(*arguments, cwd, code="from ntkbook.publish.cli import main; main()", **environment):
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=cwd, capture_output=True, text=True, check=False,
        env={**os.environ, "COLUMNS": "200", "NO_COLOR": "1", **environment},
    )  # fmt: skip


@pytest.mark.parametrize(
    "command", ["", "run", "store", "html", "book", "claims", "compare", "data status", "data fetch"]
)
def test_everything_has_help(command, toybook):
    done = ntkbook(*command.split(), "--help", cwd=toybook)
    assert done.returncode == 0, done.stderr
    assert "Usage" in done.stdout


def test_errors_are_one_message(toybook, tmp_path):
    done = ntkbook("run", "1", "--params", "sede: 3", cwd=toybook)
    assert done.returncode == 1
    assert done.stderr.strip() == "ntkbook: 01_toy has no parameter 'sede'; did you mean seed or size?"
    for wrong in ("3", "seed: [3", "{1: 2}"):
        told = ntkbook("run", "1", "--params", wrong, cwd=toybook).stderr
        assert told.startswith(f"ntkbook: --params: expected YAML such as 'seed: 3', got {wrong!r}"), told
        assert "Traceback" not in told
    assert "give --sweep FILE too" in ntkbook("run", "1", "--workers", "2", cwd=toybook).stderr
    assert "a sweep runs one chapter; got none" in ntkbook("run", "--sweep", "x.yml", cwd=toybook).stderr
    assert "_toc.yml" in ntkbook("html", cwd=tmp_path).stderr


def test_a_failing_chapter_fails_the_command(toybook):
    done = ntkbook("run", "1", "--params", "{fail: true}", "--quiet", cwd=toybook)
    assert done.returncode == 1
    assert "asked to fail" in done.stderr


def test_a_run_says_where_its_results_are(toybook):
    done = ntkbook("run", "01", "--profile", "quick", cwd=toybook)
    assert (done.returncode, done.stdout) == (0, "01_toy: fresh, runs/01_toy/quick\n"), done.stderr


def test_claims_as_json_and_markdown(toybook):
    found = json.loads(ntkbook("claims", "--json", cwd=toybook).stdout)
    rows = found["claims"]
    assert {row["verdict"] for row in rows} == {"not evaluated"}  # the toy book has none of the real chapters
    assert {"id", "place", "criterion", "value", "data", "hardware", "link"} <= rows[0].keys()
    assert found["summary"] == f"0 of {len(rows)} claims are reproduced, {len(rows)} not evaluated"
    assert ntkbook("claims", cwd=toybook).stdout.endswith(f"\n{found['summary']}.\n")
    shown = ntkbook("claims", "--markdown", cwd=toybook).stdout
    assert shown.startswith(f"**{found['summary']}.**\n")
    assert shown.count("\n| ") == 1 + len(rows)


def test_run_lists_chapters_and_parameters_and_runs_nothing(toybook):
    assert "01_toy        A toy chapter  cpu, quick" in ntkbook("run", "--list", cwd=toybook).stdout
    assert "size: int = 50\n    draws\n    quick: 5\n" in ntkbook("run", "--help-chapter", "01", cwd=toybook).stdout
    assert ntkbook("run", "--help-chapter", "2", cwd=toybook).stderr.startswith("ntkbook: no chapter '2'; there are")


def test_compare_two_runs(toybook):
    done = ntkbook("compare", "1/stored", "quick", cwd=toybook)
    assert re.search(r"parameters size +50 +5\n", done.stdout), done
    found = json.loads(ntkbook("compare", "01_toy/stored", "quick", "--json", cwd=toybook).stdout)
    assert found["parameters"]["size"] == [50, 5]
    assert "no run '1/x'; there are 01_toy/" in ntkbook("compare", "1/x", "quick", cwd=toybook).stderr


@pytest.mark.skipif(sys.platform == "win32", reason="signals are sent to a process group")
def test_after_ctrl_c_the_same_command_goes_on(toybook, tmp_path):
    """What ran is kept and told; the next run begins with the chapter that was interrupted."""
    root = shutil.copytree(toybook, tmp_path / "book")
    chapter = root / "book" / "07_scorecard.md"
    wait = "import pathlib, time\nwhile not pathlib.Path('go').exists(): time.sleep(0.1)"
    chapter.write_text(chapter.read_text("utf8") + f"\n```{{code-cell}} ipython3\n{wait}\n```\n", "utf8")
    # Jobs in the background of a shell ignore Ctrl-C, and so would their children.
    heed = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
    arguments = [
        sys.executable,
        "-c",
        f"{heed}from ntkbook.publish.cli import main; main()",
        "run",
        "--profile",
        "quick",
    ]
    running = subprocess.Popen(arguments, cwd=root, stderr=subprocess.PIPE, text=True, start_new_session=True)
    folder = root / "runs" / "07_scorecard" / "quick"
    cells, end = [], time.monotonic() + 600
    while not (cells and cells[-1].metadata.papermill.status == "running"):
        assert time.monotonic() < end, "it did not happen"
        assert running.poll() is None
        time.sleep(0.2)
        with contextlib.suppress(OSError, ValueError):  # it is being written
            cells = notebooks.read(folder / "notebook.ipynb").cells
    os.killpg(running.pid, signal.SIGINT)  # as a terminal does
    told = running.communicate(timeout=300)[1]
    assert running.returncode == 130, told
    assert "Traceback" not in told
    assert (
        "ntkbook: interrupted in 07_scorecard: what it had done is in runs/07_scorecard/quick; 1 of 2 chapters" in told
    )
    assert json.loads((folder / "card.json").read_text("utf8"))["status"] == "interrupted"
    assert any(cell.get("outputs") for cell in notebooks.read(folder / "notebook.ipynb").cells)
    (root / "book" / "go").touch()
    again = ntkbook("run", "--profile", "quick", cwd=root)
    assert "01_toy: fresh" in again.stdout
    assert "07_scorecard: done" in again.stdout


def test_claims_of_a_profiles_runs(tmp_path):
    (tmp_path / "_toc.yml").write_text("format: jb-book\nroot: index\n", "utf8")
    (name, claim), *_ = [(claim.chapter, claim) for claim in CLAIMS]
    record = make_record(claim, 0.5, 0.25, 0.75, Provenance("x", "real", "x", 0, "", "", "", ""), "gpu", 20)
    folder = tmp_path / "runs" / name / "gpu"
    folder.mkdir(parents=True)
    (folder / "claims.json").write_text(json.dumps({claim.id: asdict(record)}), "utf8")
    (folder / "card.json").write_text('{"device": "a card", "status": "done"}', "utf8")
    ran = json.loads(ntkbook("claims", "--json", "--profile", "gpu", cwd=tmp_path).stdout)["claims"]
    (row,) = [row for row in ran if row["value"] is not None]
    assert (row["id"], row["value"], row["verdict"], row["hardware"]) == (claim.id, 0.5, record.verdict, "a card")
    assert (row["run"], row["text"]) == ("done", record.text)
    told = ntkbook("claims", "--profile", "GPU", cwd=tmp_path)
    assert (told.returncode, told.stdout) == (1, "")
    assert told.stderr.startswith("ntkbook: no run with profile 'GPU'; runs/ has gpu;")
    stored = json.loads(ntkbook("claims", "--json", cwd=tmp_path).stdout)["claims"]
    assert {row["value"] for row in stored} == {None}
    assert "not both" in ntkbook("claims", "--readme", "--profile", "gpu", cwd=tmp_path).stderr


def test_data_status_needs_no_network(toybook):
    done = ntkbook("data", "status", cwd=toybook)
    assert done.returncode == 0, done.stderr
    assert "precipitation" in done.stdout
    assert {"mnist", "kmnist", "fashionmnist", "digits", "cifar10"} <= {
        line.split()[0] for line in done.stdout.splitlines()
    }


@pytest.mark.skipif(sys.platform == "win32", reason="the cache is where the system says, not the environment")
def test_data_fetch_offline_names_address_and_folder(toybook, tmp_path):
    empty = {"NTKBOOK_OFFLINE": "1", "NTKBOOK_DATA": "", "XDG_CACHE_HOME": str(tmp_path), "HOME": str(tmp_path)}
    done = ntkbook("data", "fetch", "kmnist", cwd=toybook, **empty)
    assert done.returncode == 1
    assert "kmnist: 2 of 2 files are not on this machine" in done.stderr
    assert "md5:5c965bf0a639b31b8f53240b1b52f4d7" in done.stderr
    first, second = done.stdout.splitlines()  # before anything is tried
    assert first == "kmnist: 2 of 2 files are missing, about 4.4 MB to download, about 4.4 MB of disk needed"
    assert re.fullmatch(r"[\d,]+ MB are free at .*/KMNIST/raw", second)


@pytest.mark.parametrize("fail", [True, False])
def test_a_book_that_does_not_build_still_tells_what_ran(toybook, tmp_path, fail):
    """And the earlier pages stay."""
    root = shutil.copytree(toybook, tmp_path / "book")
    pages = root / "_build" / "html"
    pages.mkdir(parents=True)
    (pages / "index.html").write_text("earlier", "utf8")
    page = root / "book" / "index.md"
    page.write_text(page.read_text("utf8") + "\n[nowhere](nowhere.md)\n", "utf8")
    if fail:
        (root / "profiles" / "quick.yml").write_text("01_toy: {fail: true}\n", "utf8")
    done = ntkbook("book", "--quiet", cwd=root)
    assert done.returncode == 1
    assert "claims are reproduced" in done.stdout
    assert "the book does not build" in done.stderr
    assert ("FAILED\n01_toy: cell" in done.stderr) is fail
    assert (pages / "index.html").read_text("utf8") == "earlier"


@pytest.mark.parametrize("missing", ["papermill", "typer", "yaml"])
def test_without_the_book_extra_it_says_what_to_install(missing, tmp_path):
    code = f"import sys; sys.modules[{missing!r}] = None; from ntkbook.publish.cli import main; main()"
    done = ntkbook(cwd=tmp_path, code=code)
    assert done.returncode == 1
    assert f"needs the book extra ({missing} is not installed)" in done.stderr
    assert "pip install 'ntkbook[book]'" in done.stderr


@pytest.mark.parametrize(("missing", "command"), [("jupytext", "run --list"), ("pooch", "data status")])
def test_with_a_part_of_the_extra_it_says_so_too(missing, command, toybook):
    code = f"import sys; sys.modules[{missing!r}] = None; from ntkbook.publish.cli import main; main()"
    done = ntkbook(*command.split(), cwd=toybook, code=code)
    assert done.returncode == 1
    assert done.stderr.strip() == (
        f"ntkbook: {missing} is not installed; it comes with the book extra: pip install 'ntkbook[book]'"
    )
