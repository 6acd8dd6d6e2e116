"""The API reference: docstrings in plain text become what Sphinx reads."""

from pathlib import Path

import pytest

import ntkbook
from ntkbook.publish.reference import parameters_apart, restructured, signature

PAGE = (Path(__file__).parents[1] / "book" / "api.md").read_text("utf8")


@pytest.mark.parametrize(
    ("line", "want"),
    [
        ("as `NTKGP.fit` does", "as :py:obj:`NTKGP.fit <ntkbook.NTKGP.fit>` does"),
        ("two `Posterior`s", "two :py:obj:`Posterior <ntkbook.Posterior>`\\ s"),
        ("`a @ b`, `x=` and `[1]`", "``a @ b``, ``x=`` and ``[1]``"),
        ("|x|² and (n, *shape)", "\\|x\\|² and (n, \\*shape)"),
        ("noise_ and a_b", "noise\\_ and a_b"),
        ("`a|b_`", "``a|b_``"),
        ('"sum" or a "mean of all"', '``"sum"`` or a "mean of all"'),
        ('is mean="zero", ("cg")', 'is ``mean="zero"``, (``"cg"``)'),
    ],
)
def test_plain_text_means_itself(line, want):
    assert restructured([line]) == [want]


def test_code_over_two_lines_stays_code():
    assert restructured(["it is `a +", "b` there"]) == ["it is ``a + b`` there"]


def test_two_entries_on_a_line_become_two():
    lines = ["Args:", "    x: (n, ...); y: (n,). more: 1; 2;", "        noise: 3; seed: 4", "In text: a; b: c."]
    want = [
        "Args:",
        "    x: (n, ...)",
        "    y: (n,).",
        "    more: 1; 2;",
        "        noise: 3; seed: 4",
        "In text: a; b: c.",
    ]
    assert restructured(lines) == want


def test_what_is_indented_below_a_paragraph_is_shown_as_it_stands():
    lines = ["So:", "", "    a | `b`", "", "    c_", "", "And |d|.", "", "Args:", "    x: |x|."]
    want = ["So:", "", "::", "", "    a | `b`", "", "    c_", "", "And \\|d\\|.", "", "Args:", "    x: \\|x\\|."]
    assert restructured(lines) == want


def test_types_have_the_names_that_the_reference_has():
    text = "(lin: ~ntkbook.linearize.Linearization, like: ~ntkbook.likelihoods.Likelihood | str = 'categorical')"
    want = "(lin: Linearization, like: ~ntkbook.likelihoods.Likelihood | str = 'categorical')"
    assert signature("ntkbook.fisher_vector_product", text) == want
    assert signature("ntkbook.by_layer", "(x: ~torch.Tensor | ~torch.device)") == "(x: Tensor | ~torch.device)"
    assert signature("ntkbook.NTKGP.to", "~ntkbook.moving.Own") == "ntkbook.NTKGP"


def test_parameters_are_no_list_of_definitions():
    long = '<dl>\n<dd><em class="sig-param">x: <dl></em>,</dd>\n<dd><em class="sig-param">y</em>,</dd>\n</dl>\n'
    fields = '<dl class="field-list">\n<dt>a</dt>\n<dd><em>b</em></dd>\n</dl>\n'
    want = '<div class="sig-params">\n<div><em class="sig-param">x: <dl></em>,</div>\n'
    want += '<div><em class="sig-param">y</em>,</div>\n</div>\n'
    assert parameters_apart(long + fields) == want + fields


def test_the_page_names_all_that_is_public():
    for name in ntkbook.__all__:
        directive = "autofunction" if name[0].islower() else "autoclass"
        assert f".. {directive}:: ntkbook.{name}\n" in PAGE
        assert f"   {name}\n" in PAGE, f"{name} is not in the table"
