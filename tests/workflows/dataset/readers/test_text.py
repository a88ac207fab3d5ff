"""Text as anybody writes it, and what labels and captions are as values."""

import math
from decimal import Decimal

import pytest

from workflows.dataset.readers.text import (
    NotText,
    are_boxes,
    are_names,
    captions_of,
    in_order,
    label_of,
    normalised,
    text_of,
    written_label,
)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_a_byte_order_mark_tells_the_encoding_and_is_no_text(encoding):
    mark = "\ufeff" if encoding in ("utf-16-le", "utf-16-be") else ""
    assert text_of((mark + "ein Kätzchen 猫").encode(encoding), "it") == "ein Kätzchen 猫"


def test_what_is_no_text_is_named_with_its_line():
    with pytest.raises(NotText, match=r"7\.txt: the caption is not UTF-8 text \(byte 0x92 in line 2\)"):
        text_of("one\nit\x92s two".encode("latin-1"), "7.txt: the caption")


@pytest.mark.parametrize(
    ("value", "label"),
    [
        (3, 3), (3.0, 3), (True, 1), (False, 0), (Decimal("4.00"), 4), ([5], 5), ([[5.0]], 5), (("a b",), "a b"), ("001", "001"),
        ("golden retriever", "golden retriever"), (2**63, 2**63), (-1, -1),
        (None, None), ("", None), (" ", None), ([], None), (math.nan, None), (Decimal("NaN"), None),
    ],
)  # fmt: skip
def test_a_label_is_a_name_or_a_whole_number(value, label):
    assert label_of(value) == label
    assert type(label_of(value)) is type(label)


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (0.5, "0.5, which is neither"), (math.inf, "inf, which is neither"), ({"a": 1}, "which is neither"),
        ([0.0, 1.0, 0.0], "a list of 3 values, such as one-hot or several classes"), (Decimal("0.5"), "which is neither"),
    ],
)  # fmt: skip
def test_what_is_no_label_is_said(value, said):
    with pytest.raises(ValueError, match=said):
        label_of(value)


def test_text_is_a_number_only_as_programs_write_them():
    texts = ["7", "-1", "0", "3.0", "10.", " 4\n", "007", "1e3", "0x1", "1.5", "a 1", "", "９"]
    assert [written_label(t) for t in texts] == [7, -1, 0, 3, 10, 4, "007", "1e3", "0x1", "1.5", "a 1", None, "９"]
    assert are_names(["001", "099", 100])
    assert are_names(["cat", "dog"])
    assert not are_names([1, 2])
    assert are_names(["cat", "dog", 10])
    assert not are_names(["cat", 1, 2])
    assert not are_names([])


def test_captions_stay_as_they_are_written():
    assert captions_of("00001") == ["00001"]
    assert captions_of(7) == ["7"]
    assert captions_of(["a", None, " ", "b"]) == ["a", "b"]
    assert [captions_of(value) for value in (None, "", "  ", math.nan, [])] == [[]] * 5
    with pytest.raises(ValueError, match="not text"):
        captions_of({"en": "a"})


@pytest.mark.parametrize(
    ("text", "are"),
    [
        ("0 0.5 0.5 0.25 0.25\n12 0.1 1 1e-05 0.2\n", True),
        ("3 0.5 0.5 0.25 0.25 0.1 0.9\r\n\r\n", True),
        ("0 0.5 0.5 0.25 0.25\na cat", False),
        ("0.5 0.5 0.25 0.25", False),
        ("7 8 9 10 11", False),
        ("00001", False),
        ("", False),
    ],
)
def test_boxes_are_no_captions(text, are):
    assert are_boxes(text) == are


def test_classes_are_in_the_order_of_their_numbers():
    assert in_order(["10", "9", "b", "2.5", "-1", "a10", "a9", "2"]) == ("-1", "2", "2.5", "9", "10", "a10", "a9", "b")
    assert in_order(["003", "010", "002"]) == ("002", "003", "010")


def test_paths_that_are_alike():
    assert {
        normalised(p) for p in ("./é/a.png", "e\u0301\\a.png", "/é/a.png", " é/a.png ", "b/../é/./a.png", "é//a.png")
    } == {"é/a.png"}
