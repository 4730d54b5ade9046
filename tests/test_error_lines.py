"""The error lines of the source: each has a test that follows its advice. See error_lines.py."""

from error_lines import WITHOUT, examples, lines, without_example


def test_every_error_line_has_an_example_whose_advice_is_followed():
    assert without_example() == {}


def test_each_mark_names_one_error_line():
    marks = {*examples(), *WITHOUT} - {*lines()}
    assert [part for part in marks if len([text for text in lines() if part in text]) != 1] == []
