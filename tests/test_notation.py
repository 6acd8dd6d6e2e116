"""The glossary: what it says things are called in code is there."""

import inspect
import re
from pathlib import Path

from ntkbook import FisherPosterior, Linearization, Posterior, Report
from ntkbook.likelihoods import Likelihood

TEXT = (Path(__file__).parents[1] / "book" / "notation.md").read_text("utf8")
OWNERS = {
    "lin": Linearization, "Posterior": Posterior, "Likelihood": Likelihood, "Report": Report,
    "FisherPosterior": FisherPosterior,
}  # fmt: skip


def test_attributes_that_the_glossary_names_are_there():
    named = re.findall(r"`(\w+)\.(\w+)", TEXT)
    used = {(owner, name) for owner, name in named if owner not in ("ntkbook", "f")}
    assert {owner for owner, _ in used} == set(OWNERS)
    for owner, name in used:
        source = "".join(inspect.getsource(cls) for cls in OWNERS[owner].__mro__[:-1] if "ntkbook" in cls.__module__)
        assert re.search(rf"(def |self\.|^    ){name}\b", source, re.MULTILINE), f"{owner}.{name}"


def test_calls_in_the_glossary_have_the_arguments_that_it_shows():
    for name, arguments in re.findall(r"`Likelihood\.(\w+)\(([^)]*)\)", TEXT):
        wanted = arguments.split(", ")
        assert list(inspect.signature(getattr(Likelihood, name)).parameters)[1 : 1 + len(wanted)] == wanted
