"""Pick-a-Pic's parquet: what is kept, what is dropped and why, and what is read."""

import hashlib
import pickle
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny
from fsspec.implementations.memory import MemoryFileSystem

from dde_fast import parquet_pairs
from dde_fast.pairs import Image, Pair, Rejected, open_source


def uid_rows(count: int = 12) -> list[dict]:
    """Rows as on the hub: with uids, equal for equal images."""
    return [
        row | {"image_0_uid": f"uid-{i}", "image_1_uid": f"uid-{(i + 5) % count}"}
        for i, row in enumerate(tiny.rows(count))
    ]


def source(tmp_path, rows, **more):
    return open_source(tiny.write_pairs(tmp_path / "train.parquet", rows), **more)


def sha(image: bytes) -> str:
    return "sha256:" + hashlib.sha256(image).hexdigest()


def bytes_of(source, image: Image) -> bytes:
    (data,) = source.read([image.place])
    return data


@pytest.mark.parametrize("make", [tiny.rows, uid_rows])
def test_the_label_says_which_image_is_the_winner(tmp_path, make):
    rows = make(4)
    opened = source(tmp_path, rows)
    found = list(opened.rows())
    assert [pair.pair_id for pair in found] == [0, 1, 2, 3]
    for row, pair in zip(rows, found, strict=True):
        order = (0, 1) if row["label_0"] == 1 else (1, 0)
        assert pair.caption == row["caption"]
        for image, side in zip((pair.winner, pair.loser), order, strict=True):
            assert bytes_of(opened, image) == row[f"jpg_{side}"]
            assert image.key == row.get(f"image_{side}_uid", sha(row[f"jpg_{side}"]))


def test_what_is_dropped_says_why_and_does_not_shift_the_others(tmp_path):
    rows = tiny.rows(12)
    rows[0] |= {"label_0": 0.5, "label_1": 0.5}
    rows[1] |= {"has_label": False}
    rows[2] |= {"label_0": None}
    rows[3] |= {"jpg_1": None}
    rows[4] |= {"label_0": 0.7, "label_1": 0.3}
    rows[5] |= {"caption": None}
    rows[6] |= {"label_0": 0.0, "label_1": 0.0}
    rows[7] |= {"jpg_1": rows[7]["jpg_0"]}
    rows[8] |= {"caption": " \n"}
    rows[9] |= {"caption": "x" * 10_001}
    found = list(source(tmp_path, rows).rows())
    assert [row.pair_id for row in found] == list(range(12))
    assert [row.reason for row in found[:10]] == [
        "tied",
        "unlabelled",
        "unlabelled",
        "without an image",
        "with labels other than 0 and 1",
        "without a caption",
        "tied",
        "identical images",
        "without a caption",
        "over-long caption",
    ]
    assert found[0] == Rejected(0, "tied", "labels 0.5 and 0.5")
    assert all(isinstance(row, Pair) for row in found[10:])


def test_limit_counts_usable_pairs(tmp_path):
    rows = tiny.rows(6)
    rows[0] |= {"label_0": 0.5, "label_1": 0.5}
    found = list(source(tmp_path, rows, limit=2).rows())
    assert [(type(row), row.pair_id) for row in found] == [(Rejected, 0), (Pair, 1), (Pair, 2)]
    assert len(list(source(tmp_path, rows, limit=0).rows())) == 6
    with pytest.raises(ValueError, match="limit: expected 0 .* got -1"):
        source(tmp_path, rows, limit=-1)


def test_kinds_of_columns(tmp_path):
    """Structs, large and dictionary types, whole-number labels, no has_label: the same pairs."""
    expected = list(source(tmp_path, uid_rows(3)).rows())
    table = pa.Table.from_pylist(uid_rows(3)).drop_columns(["has_label"])
    kinds = {
        "caption": pa.dictionary(pa.int32(), pa.string()),
        "image_0_uid": pa.large_string(),
        "image_1_uid": pa.dictionary(pa.int8(), pa.string()),
        "label_0": pa.int64(),
        "label_1": pa.bool_(),
        "jpg_1": pa.large_binary(),
    }
    for name, kind in kinds.items():
        i = table.schema.get_field_index(name)
        table = table.set_column(i, name, table.column(name).cast(kind))
    structs = [{"bytes": image, "path": None} for image in table.column("jpg_0").to_pylist()]
    table = table.set_column(table.schema.get_field_index("jpg_0"), "jpg_0", pa.array(structs))
    pq.write_table(table, tmp_path / "other.parquet")
    other = open_source(tmp_path / "other.parquet")
    assert list(other.rows()) == expected
    assert bytes_of(other, expected[0].winner) == uid_rows(3)[0]["jpg_1"]


def test_images_without_a_uid_are_known_by_their_content(tmp_path):
    rows = uid_rows(4)
    rows[2] |= {"image_0_uid": None}
    rows[3] |= {"image_1_uid": ""}
    keys = [{p.winner.key, p.loser.key} for p in source(tmp_path, rows).rows()]
    assert keys[0] == {"uid-0", "uid-1"}
    assert keys[2] == {sha(rows[2]["jpg_0"]), "uid-3"}
    assert keys[3] == {"uid-3", sha(rows[3]["jpg_1"])}


def break_column(path, name: str) -> None:
    """Make a column unreadable where it lies."""
    column = next(
        part
        for i in range(pq.ParquetFile(path).metadata.num_columns)
        if (part := pq.ParquetFile(path).metadata.row_group(0).column(i)).path_in_schema == name
    )
    data = bytearray(path.read_bytes())
    at = column.dictionary_page_offset or column.data_page_offset
    data[at : at + 8] = bytes(8)
    path.write_bytes(data)


def test_rows_with_uids_touch_no_image_and_no_other_column(tmp_path):
    path = tmp_path / "train.parquet"
    pq.write_table(pa.Table.from_pylist([row | {"huge": "x"} for row in uid_rows(3)]), path)
    for name in ("jpg_0", "huge"):
        break_column(path, name)
    opened = open_source(path)
    (first, *_) = found = list(opened.rows())
    assert len(found) == 3
    with pytest.raises(ValueError, match="pairs: expected a parquet file, got .*train.parquet"):
        list(opened.read([first.winner.place]))


def test_sorted_places_read_each_row_group_once(tmp_path, monkeypatch):
    rows = uid_rows(200)
    path = tmp_path / "train.parquet"
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=90)
    opened = open_source(path)
    images = {i.key: i for pair in opened.rows() for i in (pair.winner, pair.loser)}.values()
    groups = []
    whole = pq.ParquetFile.iter_batches

    def counting(self, *args, row_groups, **kwargs):
        groups.extend(row_groups)
        return whole(self, *args, row_groups=row_groups, **kwargs)

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", counting)
    images = sorted(images, key=lambda image: image.place)
    found = opened.read([image.place for image in images])
    for image, data in zip(images, found, strict=True):
        assert data == tiny.png(int(image.key.removeprefix("uid-")))
    assert groups == [0, 1, 2]
    jumps = [(0, 0, 85, 0), (0, 0, 2, 0), (0, 0, 70, 1), (0, 2, 19, 0), (0, 0, 0, 0)]
    numbers = [85, 2, 75, 199, 0]
    assert list(opened.read(jumps)) == [tiny.png(number) for number in numbers]


@pytest.mark.parametrize("place", [(0, 0, 99, 0), (0, 5, 0, 0)])
def test_a_place_that_is_there_no_more_is_one_clear_error(tmp_path, place):
    with pytest.raises(ValueError, match="pairs: expected a parquet file, got .*train.parquet"):
        list(source(tmp_path, uid_rows(3)).read([place]))


def test_a_network_that_fails_is_one_clear_error(tmp_path, monkeypatch):
    class Lost(Exception):
        """As remote file systems have them: no OSError."""

    opened = source(tmp_path, uid_rows(3))
    place = next(opened.rows()).winner.place

    def fail(self, *args, **kwargs):
        raise Lost("connection reset")

    monkeypatch.setattr(type(opened.fs), "_open", fail)
    for use in (lambda: list(opened.rows()), lambda: list(opened.read([place]))):
        with pytest.raises(ValueError, match=r"pairs: .*train.parquet' \(Lost: connection reset"):
            use()


def test_an_absent_image_reads_as_no_bytes(tmp_path):
    rows = uid_rows(3)
    rows[1] |= {"jpg_0": None}
    opened = source(tmp_path, rows)
    assert bytes_of(opened, list(opened.rows())[1].winner) == b""


def test_a_folder_has_splits(tmp_path):
    (tmp_path / "data").mkdir()
    for name, count in (
        ("train-00001", 3),
        ("train-00000", 2),
        ("test-0", 4),
        ("test_unique-0", 6),
    ):
        tiny.write_pairs(tmp_path / "data" / f"{name}-of-2.parquet", tiny.rows(count))
    pairs = list(open_source(tmp_path, "train").rows())
    assert [pair.pair_id for pair in pairs] == list(range(5))
    first = open_source(tmp_path / "data/train-00000-of-2.parquet")
    assert pairs[:2] == list(first.rows())
    assert len(list(open_source(tmp_path, "test").rows())) == 4  # not those of test_unique
    with pytest.raises(ValueError, match=r"split: expected .*'dev'.*got \['data', 'test', "):
        open_source(tmp_path, "dev")
    put_aside = tmp_path / "data/._train-0.parquet"
    put_aside.write_bytes(b"what macOS leaves beside a file")
    assert len(list(open_source(tmp_path, "train").rows())) == 5
    (tmp_path / "default/dev").mkdir(parents=True)
    tiny.write_pairs(tmp_path / "default/dev/0000.parquet", tiny.rows(7))
    assert len(list(open_source(tmp_path, "dev").rows())) == 7


@pytest.mark.parametrize("url", ["memory://pairs/sets", "file://{tmp_path}/sets", "owner/name_v2"])
def test_other_file_systems(tmp_path, url, monkeypatch):
    """A URL and the hub, here served from memory, give what the local folder gives."""
    for i in range(2):
        (tmp_path / "sets/data").mkdir(parents=True, exist_ok=True)
        tiny.write_pairs(tmp_path / f"sets/data/train-{i}.parquet", uid_rows(6 + i))

    class Hub(MemoryFileSystem):
        protocol = ("hf",)
        store, pseudo_dirs = {}, [""]

        @classmethod
        def _strip_protocol(cls, path):
            return "/" + path.removeprefix("hf://").strip("/")

    monkeypatch.setitem(sys.modules["fsspec.registry"]._registry, "hf", Hub)
    for fs, root in ((MemoryFileSystem(), "/pairs/sets"), (Hub(), "/datasets/owner/name_v2")):
        for i in range(2):
            data = (tmp_path / f"sets/data/train-{i}.parquet").read_bytes()
            fs.pipe_file(f"{root}/data/train-{i}.parquet", data)
    local, remote = open_source(tmp_path / "sets"), open_source(url.format(tmp_path=tmp_path))
    pairs = list(local.rows())
    assert len(pairs) == 13 and list(remote.rows()) == pairs
    places = sorted(pair.loser.place for pair in pairs)
    assert list(remote.read(places)) == list(local.read(places))
    assert remote.fingerprint() == local.fingerprint()


def test_the_fingerprint_is_of_the_content(tmp_path, monkeypatch):
    def fingerprint(rows, name="train.parquet"):
        return open_source(tiny.write_pairs(tmp_path / name, rows)).fingerprint()

    first = fingerprint(tiny.rows(4))
    assert first == fingerprint(tiny.rows(4)) == fingerprint(tiny.rows(4), "other.parquet")
    for change in ({"caption": "other"}, {"jpg_0": tiny.png(77)}, {"label_0": 1.0, "label_1": 0.0}):
        rows = tiny.rows(4)
        rows[0] |= change
        assert fingerprint(rows) != first
    assert fingerprint(tiny.rows(4)[::-1]) != first
    # of a file larger than both ends
    monkeypatch.setattr(parquet_pairs, "_EDGE", 1000)
    longer = fingerprint(tiny.rows(40))
    assert longer != fingerprint(tiny.rows(41)) and longer == fingerprint(tiny.rows(40))


def test_a_source_can_be_sent_to_another_process(tmp_path):
    opened = source(tmp_path, uid_rows(4))
    rows = opened.rows()
    first = next(rows)
    again = pickle.loads(pickle.dumps(opened))
    assert next(again.rows()) == first
    assert bytes_of(again, first.winner) == bytes_of(opened, first.winner)


@pytest.mark.parametrize("column", ["caption", "jpg_0", "jpg_1", "label_0", "label_1"])
def test_a_missing_column_is_named(tmp_path, column):
    rows = [{key: value for key, value in row.items() if key != column} for row in tiny.rows(2)]
    with pytest.raises(ValueError, match=rf"pairs: expected columns .* without \['{column}'\]"):
        list(source(tmp_path, rows).rows())


@pytest.mark.parametrize(
    "column, value, expected",
    [
        ("caption", 5, "expected text in column 'caption' of .* got int64"),
        ("label_0", "1", "expected numbers in column 'label_0' of .* got string"),
        ("jpg_0", "path.png", "expected bytes in column 'jpg_0' of .* got string"),
        ("jpg_1", {"path": "path.png"}, "expected bytes in column 'jpg_1' of .* got struct"),
        ("has_label", 1, "expected booleans in column 'has_label' of .* got int64"),
        ("image_0_uid", 7, "expected text in column 'image_0_uid' of .* got int64"),
    ],
)
def test_a_column_of_another_type_is_named(tmp_path, column, value, expected):
    rows = [row | {column: value} for row in uid_rows(2)]
    with pytest.raises(ValueError, match="pairs: " + expected):
        list(source(tmp_path, rows).rows())


def test_a_caption_that_is_no_text_costs_its_own_row(tmp_path):
    rows = tiny.rows(3)
    table = pa.Table.from_pylist(rows)
    captions = pa.array([b"good", b"\xff\xfe", "schön 日本 \u202e🙂".encode()])
    captions = pa.Array.from_buffers(pa.string(), 3, captions.buffers())  # unchecked
    table = table.set_column(0, "caption", captions)
    pq.write_table(table, tmp_path / "train.parquet")
    found = list(open_source(tmp_path / "train.parquet").rows())
    assert [getattr(row, "caption", None) for row in found] == [
        "good",
        None,
        "schön 日本 \u202e🙂",
    ]
    assert found[1].reason == "unreadable caption"


def test_damaged_files_are_one_clear_error(tmp_path):
    """Wherever a file is damaged: rows as before, or rejected ones, or one ValueError."""
    path = tiny.write_pairs(tmp_path / "train.parquet", uid_rows(12))
    whole, random, errors = path.read_bytes(), np.random.default_rng(0), 0
    for i in range(60):
        data = bytearray(whole)
        # every other one in the footer, where the structure is
        low = 0 if i % 2 else int(len(data) * 0.8)
        for at in random.integers(low, len(data), 4):
            data[at] = random.integers(256)
        if i % 5 == 0:
            del data[random.integers(len(data)) :]
        path.write_bytes(data)
        try:
            opened = open_source(path)
            opened.fingerprint()
            pairs = [row for row in opened.rows() if isinstance(row, Pair)]
            list(opened.read([pair.winner.place for pair in pairs]))
        except ValueError as error:
            assert str(error).startswith(("pairs: expected", "split: "))
            errors += 1
    assert errors > 20
