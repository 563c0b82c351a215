"""Folders of pairs: what is matched, and what is refused."""

import os

import pytest
import tiny
from pair_files import outcome, put

from dde_fast.pairs import Pair, open_source


@pytest.fixture
def folder(tmp_path):
    """Pairs a … e: complete, other suffixes, no loser, no caption, two winners."""
    for name, content in {
        "w/a.png": tiny.png(0),
        "l/a.png": tiny.png(1),
        "w/a.txt": "  a cat\n",
        "w/sub/b.png": tiny.png(2),
        "l/sub/b.webp": tiny.png(3),
        "captions/sub/b.txt": "\ufeffein Schäf\u202echen 🐑",
        "w/c.png": tiny.png(4),
        "w/d.png": tiny.png(5),
        "l/d.png": tiny.png(6),
        "w/e.png": tiny.png(7),
        "w/e.jpg": tiny.png(8),
        "l/e.png": tiny.png(9),
        "l/f.png": tiny.png(10),
        "w/.DS_Store": "",
    }.items():
        put(tmp_path / "pairs" / name, content)
    return tmp_path / "pairs"


def test_a_folder_of_pairs_is_matched_by_name(folder):
    source = open_source(folder)
    assert outcome(source) == [
        (0, "0 > 1"),
        (1, "without its other image"),
        (2, "without a caption"),
        (3, "with several images of one name"),
        (4, "without its other image"),
        (5, "2 > 3"),
    ]
    assert [r.caption for r in source.rows() if isinstance(r, Pair)] == [
        "a cat",
        "ein Schäf\u202echen 🐑",
    ]


def test_the_caption_beside_the_winner_goes_first(folder):
    put(folder / "captions/a.txt", "another")
    assert next(open_source(folder).rows()).caption == "a cat"


def test_a_folder_of_pairs_may_have_splits(folder):
    (folder.parent / "all").mkdir()
    folder.rename(folder.parent / "all/train")
    assert len(outcome(open_source(folder.parent / "all", "train"))) == 6
    with pytest.raises(ValueError, match="which is none of them"):
        open_source(folder.parent / "all", "test")


def test_the_fingerprint_of_a_folder_follows_names_captions_and_sizes(folder):
    seen = {open_source(folder).fingerprint()}
    assert open_source(folder).fingerprint() in seen
    for name, content in (("w/a.txt", "a dog"), ("w/a.png", b"shorter"), ("l/c.png", tiny.png(9))):
        put(folder / name, content)
        seen.add(open_source(folder).fingerprint())
    assert len(seen) == 4


@pytest.mark.parametrize(
    "caption, reason",
    [
        (b"", "without a caption"),
        (b" \r\n\t", "without a caption"),
        (b"\xef\xbb\xbf\n", "without a caption"),
        (b"\xff\xfe\x00c", "unreadable caption"),
        (b"\xed\xa0\x80", "unreadable caption"),  # a surrogate
        (b"x" * 20_000, "over-long caption"),
        ("🐑".encode()[:3], "unreadable caption"),
    ],
)
def test_captions_that_are_none(folder, caption, reason):
    put(folder / "w/a.txt", caption)
    assert outcome(open_source(folder))[0] == (0, reason)


def test_names_that_are_no_unicode_are_reported_printably(folder):
    for name in (b"w/\xff.png", b"w/\xff.jpg", b"l/\xff.png"):
        with open(os.path.join(os.fsencode(folder), name), "wb") as file:
            file.write(tiny.png(0))
    *_, last = open_source(folder).rows()
    assert last.reason == "with several images of one name"
    assert last.detail.encode() and "\\udcff" in last.detail
    assert len(open_source(folder).fingerprint()) == 64
