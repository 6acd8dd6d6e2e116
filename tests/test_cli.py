"""The command line, as a user meets it."""

import json
import os
import subprocess
import sys

import pytest


def ntkbook(*arguments, cwd, code="from ntkbook.publish.cli import main; main()", **environment):
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=cwd, capture_output=True, text=True, check=False,
        env={**os.environ, "COLUMNS": "200", "NO_COLOR": "1", **environment},
    )  # fmt: skip


@pytest.mark.parametrize("command", ["", "run", "store", "html", "book", "claims", "data status", "data fetch"])
def test_everything_has_help(command, toybook):
    done = ntkbook(*command.split(), "--help", cwd=toybook)
    assert done.returncode == 0, done.stderr
    assert "Usage" in done.stdout


def test_errors_are_one_message(toybook, tmp_path):
    done = ntkbook("run", "1", "--params", "sede: 3", cwd=toybook)
    assert done.returncode == 1
    assert done.stderr.strip() == "ntkbook: 01_toy has no parameter 'sede'; did you mean seed or size?"
    assert "expected YAML" in ntkbook("run", "1", "--params", "3", cwd=toybook).stderr
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
    rows = json.loads(ntkbook("claims", "--json", cwd=toybook).stdout)
    assert all(row["record"] is None for row in rows)  # the toy book has none of the real chapters
    assert {"id", "criterion", "sentence"} <= {*rows[0], "criterion"}
    assert ntkbook("claims", "--markdown", cwd=toybook).stdout.startswith("| claim |")


def test_data_status_needs_no_network(toybook):
    done = ntkbook("data", "status", cwd=toybook)
    assert done.returncode == 0, done.stderr
    assert "precipitation" in done.stdout
    assert {"mnist", "kmnist", "fashionmnist", "digits", "cifar10"} <= {
        line.split()[0] for line in done.stdout.splitlines()
    }


def test_data_fetch_offline_names_address_and_folder(toybook, tmp_path):
    empty = {"NTKBOOK_OFFLINE": "1", "NTKBOOK_DATA": "", "XDG_CACHE_HOME": str(tmp_path)}
    done = ntkbook("data", "fetch", "kmnist", cwd=toybook, **empty)
    if sys.platform == "linux":  # where XDG_CACHE_HOME says where the cache is
        assert done.returncode == 1
        assert "kmnist: 2 of 2 files are not on this machine" in done.stderr
        assert "md5:5c965bf0a639b31b8f53240b1b52f4d7" in done.stderr


def test_without_the_book_extra_it_says_what_to_install(tmp_path):
    code = "import sys; sys.modules['papermill'] = None; from ntkbook.publish.cli import main; main()"
    done = ntkbook(cwd=tmp_path, code=code)
    assert done.returncode == 1
    assert "needs the book extra" in done.stderr
    assert "pip install 'ntkbook[book]'" in done.stderr
