"""Tables and rankings: what is read, and what is refused of them."""

import csv
import json
import os
import pickle

import numpy as np
import pytest
import tiny
from fsspec.implementations.memory import MemoryFileSystem
from pair_files import images, outcome, put

from dde_fast import file_pairs
from dde_fast.pairs import Pair, open_source


def write_csv(path, rows, columns=("caption", "winner", "loser"), **options):
    with open(path, "w", newline="", encoding="utf-8", errors="surrogateescape") as file:
        csv.writer(file, **options).writerows([columns, *rows])
    return path


def write_jsonl(path, rows, columns=("caption", "winner", "loser")):
    lines = [json.dumps(dict(zip(columns, row, strict=False))) for row in rows]
    return put(path, "\n".join(lines))


ROWS = [("a", "0.png", "1.png"), ('b, "quoted"\nü 日本', "sub/2.png", "0.png")]


@pytest.mark.parametrize("name", ["train.csv", "train.tsv", "train.jsonl", "train.ndjson"])
def test_a_table(tmp_path, name):
    images(tmp_path)
    put(tmp_path / "sub/2.png", tiny.png(2))
    if name.endswith(("jsonl", "ndjson")):
        write_jsonl(tmp_path / name, ROWS)
    else:
        write_csv(tmp_path / name, ROWS, delimiter="\t" if name.endswith(".tsv") else ",")
    for spec in (tmp_path / name, tmp_path):  # the file, and the folder with a split
        source = open_source(spec, "train")
        assert outcome(source) == [(0, "0 > 1"), (1, "2 > 0")]
        assert [pair.caption for pair in source.rows()] == [row[0] for row in ROWS]
    put(tmp_path / name, b"\xef\xbb\xbf" + (tmp_path / name).read_bytes())  # as Windows writes it
    assert outcome(open_source(tmp_path / name)) == [(0, "0 > 1"), (1, "2 > 0")]
    first = open_source(tmp_path / name).fingerprint()
    put(tmp_path / name, (tmp_path / name).read_bytes().replace(b"1.png", b"3.png"))
    assert outcome(open_source(tmp_path / name))[0] == (0, "0 > 3")
    assert open_source(tmp_path / name).fingerprint() != first
    assert len(outcome(open_source(tmp_path / name, limit=1))) == 1
    pickle.dumps(open_source(tmp_path / name))


def test_a_table_on_another_file_system(tmp_path):
    fs = MemoryFileSystem()
    write_csv(tmp_path / "t.csv", ROWS[:1] + [("b", "../0.png", "1.png")])
    fs.pipe({"/set/t.csv": (tmp_path / "t.csv").read_bytes()})
    fs.pipe({f"/set/images/{i}.png": tiny.png(i) for i in range(2)})
    found = outcome(open_source("memory://set/t.csv"))
    assert found == [(0, "0 > 1"), (1, "path outside the folder")]


PATHS = {
    "0.png": "0 > 1",
    "sub/../0.png": "0 > 1",
    "./0.png": "0 > 1",
    "{folder}/0.png": "0 > 1",
    "../0.png": "path outside the folder",
    "sub/../../secret.png": "path outside the folder",
    "../table-and-more/0.png": "path outside the folder",
    "/etc/passwd": "path outside the folder",
    "{folder}/../secret.png": "path outside the folder",
    "images/../../secret.png": "path outside the folder",
    ".": "path outside the folder",
    "missing.png": "missing image file",
    "0.png/more": "unreadable image file",
    "http://example.com/0.png": "missing image file",
    "hf://datasets/a/b/0.png": "missing image file",
    "~/0.png": "missing image file",
    "sub": "unreadable image file",
    "pipe": "unreadable image file",
    "a\0b": "unreadable image file",
    "x" * 5000: "unreadable image file",
    "1.png": "identical images",
    "": "without an image",
    "  ": "without an image",
}


@pytest.mark.parametrize("name", list(PATHS), ids=lambda name: name[:24])
def test_paths_of_a_table_stay_in_its_folder(tmp_path, name):
    folder = images(tmp_path / "table")
    put(tmp_path / "secret.png", tiny.png(3))
    put(tmp_path / "table-and-more/0.png", tiny.png(4))
    (folder / "sub").mkdir()
    os.mkfifo(folder / "pipe")
    write_jsonl(folder / "t.jsonl", [("a", name.format(folder=folder), "1.png"), ROWS[0]])
    found = outcome(open_source(folder / "t.jsonl"))
    assert found == [(0, PATHS[name]), (1, "0 > 1")]


def test_a_large_file_is_not_read(tmp_path, monkeypatch):
    images(tmp_path)
    monkeypatch.setattr(file_pairs, "MAX_BYTES", len(tiny.png(0)) - 1)
    write_csv(tmp_path / "t.csv", ROWS[:1])
    assert outcome(open_source(tmp_path / "t.csv")) == [(0, "over-large image")]


def test_a_file_that_went_away_is_one_clear_error(tmp_path):
    images(tmp_path)
    source = open_source(write_csv(tmp_path / "t.csv", ROWS[:1]))
    pair = next(source.rows())
    (tmp_path / "0.png").unlink()
    with pytest.raises(ValueError, match="pairs: cannot read the image .*0.png"):
        list(source.read([pair.winner.place]))


LINES = {
    "not json": "unreadable row",
    '{"caption": "a", "winner": "0.png"': "unreadable row",
    "[1, 2]": "unreadable row",
    "null": "unreadable row",
    "[" * 100_000: "unreadable row",
    "{}": "without a caption",
    '{"caption": null, "winner": "0.png", "loser": "1.png"}': "without a caption",
    '{"caption": 5, "winner": "0.png", "loser": "1.png"}': "unreadable caption",
    '{"caption": ["a"], "winner": "0.png", "loser": "1.png"}': "unreadable caption",
    '{"caption": "\\ud800", "winner": "0.png", "loser": "1.png"}': "unreadable caption",
    '{"caption": "a\\u0000b", "winner": "0.png", "loser": "1.png"}': "0 > 1",
    '{"caption": "a", "winner": "0.png"}': "without an image",
    '{"caption": "a", "winner": 0, "loser": "1.png"}': "without an image",
    '{"caption": "a", "winner": {"a": 1}, "loser": "1.png"}': "without an image",
    '{"caption": "a", "winner": "0.png", "loser": "1.png", "more": NaN}': "0 > 1",
    "\udcff\udcfe": "unreadable row",
}


@pytest.mark.parametrize("line", list(LINES), ids=lambda line: ascii(line[:60]))
def test_a_line_of_jsonl_that_is_no_pair_costs_itself_alone(tmp_path, line):
    images(tmp_path)
    good = json.dumps({"caption": "a", "winner": "0.png", "loser": "1.png"})
    text = "\n".join([good, line, "", good])
    put(tmp_path / "t.jsonl", text.encode(errors="surrogateescape"))
    found = outcome(open_source(tmp_path / "t.jsonl"))
    assert found == [(0, "0 > 1"), (1, LINES[line]), (2, "0 > 1")]


CELLS = {
    "a": "without an image",
    "a,0.png": "without an image",
    "a,0.png,1.png,more": "unreadable row",
    ",0.png,1.png": "without a caption",
    "\udcff,0.png,1.png": "unreadable caption",
    "a,\udcff.png,1.png": "missing image file",
}


@pytest.mark.parametrize("line", list(CELLS), ids=ascii)
def test_a_row_of_csv_that_is_no_pair_costs_itself_alone(tmp_path, line):
    images(tmp_path)
    text = "\n".join(["caption,winner,loser", "a,0.png,1.png", line, "b,2.png,1.png"])
    put(tmp_path / "t.csv", text.encode(errors="surrogateescape"))
    found = outcome(open_source(tmp_path / "t.csv"))
    assert found == [(0, "0 > 1"), (1, CELLS[line]), (2, "2 > 1")]


@pytest.mark.parametrize(
    "name, content, expected",
    [
        ("t.csv", "", r"expected columns .* without \['caption', 'winner', 'loser'\]"),
        ("t.csv", "caption,winner\na,b", r"expected columns .* without \['loser'\]"),
        ("t.csv", "caption;winner;loser\na;b;c", "expected columns"),
        (
            "t.csv",
            f"caption,winner,loser\n{'x' * 200_000},0.png,1.png",
            "expected CSV, .* .after line 1",
        ),
        ("t.json", "", "expected JSON"),
        ("t.json", "{", "expected JSON"),
        ("t.json", "[" * 100_000, "expected JSON"),
        ("t.json", b"\xff\xfe\xfd", "expected JSON"),
        ("t.json", '{"prompt": "a"}', "expected a list of rankings in .* got a dict"),
        ("t.json", "5", "expected a list of rankings in .* got a int"),
    ],
)
def test_a_broken_listing_is_one_clear_error(tmp_path, name, content, expected):
    put(tmp_path / name, content)
    with pytest.raises(ValueError, match="pairs: " + expected):
        list(open_source(tmp_path / name).rows())


# Rankings


def rankings(path, *entries):
    return put(path, json.dumps(entries))


@pytest.mark.parametrize("key", ["image_path", "file_path"])
@pytest.mark.parametrize("place", [".", "train", "images"])
def test_hpd_pairs(tmp_path, key, place):
    images(tmp_path / place)
    base = {"prompt": "a", "user_hash": "x"}
    rankings(
        tmp_path / "train.json",
        base | {key: ["0.png", "1.png"], "human_preference": [1, 0]},
        base | {key: ["0.png", "1.png"], "human_preference": [0, 1]},
        base | {key: ["2.png", "3.png"], "human_preference": [0, 0]},
        base | {key: ["2.png", "2.png"], "human_preference": [0, 1]},
    )
    for spec in (tmp_path, tmp_path / "train.json"):
        found = outcome(open_source(spec))
        assert found == [(0, "0 > 1"), (1, "1 > 0"), (2, "tied"), (3, "identical images")]


def test_hpd_rankings_give_each_pair_of_their_images(tmp_path):
    images(tmp_path)
    rankings(
        tmp_path / "test.json",
        {"prompt": "a", "image_path": ["0.png", "1.png", "2.png"], "rank": [2, 1, 2]},
        {"prompt": "b", "image_path": ["3.png", "0.png"], "rank": [1.5, 2.25]},
        {"prompt": "c", "image_path": ["0.png", "1.png", "2.png"], "human_preference": [0, 0, 1]},
    )
    source = open_source(tmp_path, "test")
    assert outcome(source) == [
        (0, "1 > 0"),
        (1, "tied"),
        (2, "1 > 2"),
        (3, "3 > 0"),
        (4, "tied"),
        (5, "2 > 0"),
        (6, "2 > 1"),
    ]
    assert [pair.caption for pair in source.rows() if isinstance(pair, Pair)] == [*"aabcc"]


TWO = ["0.png", "1.png"]
ENTRIES = {
    "no object": ([1, 2], "unreadable row"),
    "null": (None, "unreadable row"),
    "no images": ({"prompt": "a", "human_preference": [1, 0]}, "without its other image"),
    "one image": ({"prompt": "a", "image_path": ["0.png"], "rank": [1]}, "without its other image"),
    "a name": ({"prompt": "a", "image_path": "0.png", "rank": [1]}, "without its other image"),
    "no label": ({"prompt": "a", "image_path": TWO}, "unlabelled"),
    "a null": ({"prompt": "a", "image_path": TWO, "rank": None}, "unlabelled"),
    "too few": ({"prompt": "a", "image_path": TWO, "rank": [1]}, "unreadable preference"),
    "words": ({"prompt": "a", "image_path": TWO, "rank": ["1", "2"]}, "unreadable preference"),
    "nan": (
        {"prompt": "a", "image_path": TWO, "rank": [1, float("nan")]},
        "unreadable preference",
    ),
    "an index": (
        {"prompt": "a", "image_path": TWO, "human_preference": 1},
        "unreadable preference",
    ),
    "numbers": ({"prompt": "a", "image_path": [0, 1], "rank": [1, 2]}, "without an image"),
    "no prompt": ({"image_path": TWO, "rank": [1, 2]}, "without a caption"),
    "another prompt": ({"prompt": {}, "image_path": TWO, "rank": [1, 2]}, "unreadable caption"),
    "away": ({"prompt": "a", "image_path": ["/0.png", "1.png"], "rank": [1, 2]}, "path outside"),
    "too many": (
        {"prompt": "a", "image_path": ["0.png"] * 65, "rank": list(range(65))},
        "with too many images",
    ),
}


@pytest.mark.parametrize("name", list(ENTRIES))
def test_an_entry_that_is_no_ranking_costs_itself_alone(tmp_path, name):
    images(tmp_path)
    entry, reason = ENTRIES[name]
    good = {"prompt": "a", "image_path": TWO, "rank": [1, 2]}
    found = outcome(open_source(rankings(tmp_path / "t.json", good, entry, good)))
    assert found[::2] == [(0, "0 > 1"), (2, "0 > 1")]
    assert found[1][0] == 1 and found[1][1].startswith(reason)


@pytest.mark.parametrize("name", ["t.csv", "t.tsv", "t.jsonl", "t.json"])
def test_damaged_listings_are_rows_or_one_clear_error(tmp_path, name):
    images(tmp_path)
    rows = [(f"caption {i} é", f"{i % 4}.png", f"{(i + 1) % 4}.png") for i in range(8)]
    if name == "t.json":
        rankings(
            tmp_path / name,
            *({"prompt": c, "image_path": [w, x], "human_preference": [1, 0]} for c, w, x in rows),
        )
    elif name == "t.jsonl":
        write_jsonl(tmp_path / name, rows)
    else:
        write_csv(tmp_path / name, rows, delimiter="\t" if name == "t.tsv" else ",")
    whole, random, damaged = (tmp_path / name).read_bytes(), np.random.default_rng(0), 0
    for i in range(40):
        data = bytearray(whole)
        for at in random.integers(0, len(data), 6):
            data[at] = random.integers(256)
        if i % 4 == 0:
            del data[random.integers(len(data)) :]
        put(tmp_path / name, bytes(data))
        try:
            found = list(open_source(tmp_path / name).rows())
            assert [row.pair_id for row in found] == list(range(len(found)))
            damaged += any(not isinstance(row, Pair) for row in found)
        except ValueError as error:
            assert str(error).startswith("pairs: expected")
            damaged += 1
    assert damaged > 20
