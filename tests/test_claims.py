"""Claims: the one rule, what a notebook stores of it, and that a changed number or verdict is seen."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ntkbook.publish import claims, scorecard
from ntkbook.publish.verdicts import Claim, judge, make_record

BELOW = Claim("below", "01_toy", "nowhere", "It is small.", "a number", "<", 0.0)
INSIDE = Claim("inside", "01_toy", "nowhere", "It is right.", "a share", "in", (0.9, 1.0))
TOY = (Claim("toy-mean", "01_toy", "nowhere", "The mean is large.", "mean", ">", -1.0),)
REAL = SimpleNamespace(name="toy", description="Toy data.", is_stand_in=False)
STAND_IN = SimpleNamespace(name="toy", description="Toy data.", is_stand_in=True)


@pytest.mark.parametrize(
    ("claim", "numbers", "verdict"),
    [
        (BELOW, (-1.0, -2.0, -0.5), "reproduced"),
        (BELOW, (-1.0, -2.0, 0.0), "partly"),
        (BELOW, (-1.0, -2.0, 0.5), "partly"),
        (BELOW, (0.0, -2.0, 0.5), "not reproduced"),
        (BELOW, (1.0, 0.5, 2.0), "not reproduced"),
        (INSIDE, (0.95, 0.9, 1.0), "reproduced"),
        (INSIDE, (0.95, 0.89, 1.0), "partly"),
        (INSIDE, (0.85, 0.8, 0.95), "not reproduced"),
        (BELOW, (None, None, None), "not evaluated"),
    ],
)
def test_the_rule(claim, numbers, verdict):
    assert judge(claim, *numbers, profile="cpu", stand_in=False) == verdict
    assert judge(claim, *numbers, profile="quick", stand_in=False) == "not evaluated"
    assert judge(claim, *numbers, profile="gpu", stand_in=True) == "not evaluated"


@given(st.tuples(*[st.floats(-10, 10)] * 3).map(sorted))
def test_a_wider_interval_never_makes_a_better_verdict(numbers):
    low, value, high = numbers
    order = ["not reproduced", "partly", "reproduced"]
    narrow, wide = (judge(BELOW, value, low - w, high + w, profile="cpu", stand_in=False) for w in (0.0, 1.0))
    assert order.index(wide) <= order.index(narrow)


@pytest.mark.parametrize(
    "numbers",
    [(1.0, None, None), (1.0, 2.0, 3.0), (float("nan"), 0.0, 1.0), (None, 0.0, 1.0), (0.0, 0.0, float("inf"))],
)
def test_a_value_needs_its_interval(numbers):
    with pytest.raises(ValueError, match="claim 'below'"):
        make_record(BELOW, *numbers, REAL, "cpu", 3)


def test_a_record_is_json_and_keeps_the_stand_in():
    record = make_record(BELOW, -1.0, -2.0, -0.5, STAND_IN, "cpu", 3, "a note")
    assert record.verdict == "not evaluated"
    assert claims.Record(**json.loads(json.dumps(record.__dict__))) == record
    assert record.text == "−1.0 [−2.0, −0.5]"


@pytest.mark.parametrize(
    ("numbers", "text"),
    [
        ((1234.0,) * 3, "1234"),
        ((1234567.0,) * 3, "1234567"),
        ((276.4,) * 3, "280"),
        ((0.00321,) * 3, "0.0032"),
        ((-1.0, -2.0, -0.5), "−1.0 [−2.0, −0.5]"),
        ((1250.0, 1200.0, 1300.0), "1250 [1200, 1300]"),
        ((-1e-4, -4.5e-4, 2.5e-4), "−0.00010 [−0.00045, 0.00025]"),
        ((2e-9, 1e-9, 3e-9), "2e−09 [1e−09, 3e−09]"),
        ((-1.5e-8, -3.25e-8, 2e-9), "−1.5e−08 [−3.2e−08, 2e−09]"),
        ((0.5, 1e-9, 1.0), "0.5 [1e−09, 1]"),  # the low end is above zero
        ((1.0, 0.9999999, 1.0000001), "1 [0.9999999, 1.0000001]"),
    ],
)
def test_a_value_is_shown_with_the_digits_that_mean_something(numbers, text):
    assert make_record(BELOW, *numbers, REAL, "cpu", 3).text == text


def test_a_direction_needs_its_kind_of_threshold():
    with pytest.raises(ValueError, match="one threshold"):
        Claim("x", "01_toy", "", "", "", "in", 0.5)


def test_the_registry_has_no_doubles_and_names_known_claims():
    assert list(claims.registry()) == [claim.id for claim in claims.CLAIMS]
    with pytest.raises(ValueError, match="share an id"):
        claims.registry((BELOW, BELOW))
    with pytest.raises(KeyError, match="no claim 'nothing'"):
        claims.record("nothing", 1.0, 0.0, 2.0, REAL, "cpu", 1)


def test_a_stored_notebook_is_right(toybook):
    path = toybook / "book" / "01_toy.ipynb"
    record = claims.collect(path)["toy-mean"]
    assert record.verdict == "reproduced"
    assert record.n == 50
    assert scorecard.check(path, TOY) == []
    assert claims.collect_data(path)["draws"]["description"] == "Draws of a normal distribution."
    quick = claims.collect(toybook / "runs" / "01_toy" / "quick" / "notebook.ipynb")
    assert quick["toy-mean"].verdict == "not evaluated"


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"verdict\\": \\"reproduced', '"verdict\\": \\"partly'),  # the stored verdict
        ('"low\\": -', '"low\\": -7'),  # one stored number, which changes the verdict
        ('"high\\": ', '"high\\": 7'),  # one that does not
        ('"criterion\\": \\"> −1', '"criterion\\": \\"> −2'),
        ("'reproduced'", "'not reproduced'"),  # what the prose quotes
        (">reproduced</span>", ">partly</span>"),  # what the page shows
    ],
)
def test_a_change_in_a_stored_notebook_is_seen(toybook, old, new):
    text = (toybook / "book" / "01_toy.ipynb").read_text("utf8")
    assert old in text
    assert scorecard.check(json.loads(text.replace(old, new)), TOY)


def test_another_criterion_in_the_registry_is_seen(toybook):
    stricter = (replace(TOY[0], threshold=5.0),)
    problems = scorecard.check(toybook / "book" / "01_toy.ipynb", stricter)
    assert any("the registry says" in problem for problem in problems)
    assert any("give 'not reproduced'" in problem for problem in problems)
