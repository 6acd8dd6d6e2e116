"""What the command line lists of chapters and parameters."""

import re

import pytest

from ntkbook.publish import listing


def test_chapters_with_titles_and_profiles(toybook):
    lines = listing.chapters_text(toybook).splitlines()
    assert [re.split(r"\s{2,}", line) for line in lines] == [
        ["chapter", "title", "profiles"],
        ["01_toy", "A toy chapter", "cpu, quick"],
        ["07_scorecard", "Scorecard", "cpu"],
    ]
    assert len({line.find(cell) for line, cell in zip(lines, ("profiles", "cpu", "cpu"))}) == 1


def test_parameters_with_type_default_comment_and_profiles(toybook):
    lines = listing.parameters_text(toybook, "1").splitlines()
    assert lines[0] == "01_toy: A toy chapter"
    assert lines[lines.index("size: int = 50") :][:3] == ["size: int = 50", "    draws", "    quick: 5"]
    assert lines[lines.index("sizes: list[int] = [1, 2]") :][:2] == ["sizes: list[int] = [1, 2]", "    not used"]
    with pytest.raises(ValueError, match="no chapter '2'"):
        listing.parameters_text(toybook, "2")
