"""The error lines of the source: each has a test that follows its advice. See error_lines.py."""

import pytest
from error_lines import WITHOUT, examples, lines, without_example


def test_every_error_line_has_an_example_whose_advice_is_followed():
    assert without_example() == {}


@pytest.mark.parametrize('part', [*examples(), *WITHOUT])
def test_a_mark_names_one_error_line(part):
    assert part in lines() or len([text for text in lines() if part in text]) == 1
