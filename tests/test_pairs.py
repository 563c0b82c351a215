"""Reading preference pairs: what is kept, what is dropped and why."""

import io

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny
from PIL import Image

from dde_fast.pairs import Pair, decode, load_pairs, parquet_files, read_rows


def load(tmp_path, rows, **more):
    return load_pairs(tiny.write_pairs(tmp_path / "train.parquet", rows), **more)


def test_the_label_says_which_image_is_the_winner(tmp_path):
    rows = tiny.rows(4)
    table = load(tmp_path, rows)
    assert table.rows == len(table.pairs) == 4 and not table.dropped
    for i, (row, pair) in enumerate(zip(rows, table.pairs, strict=True)):
        first, second = row["jpg_0"], row["jpg_1"]
        winner, loser = (first, second) if row["label_0"] == 1 else (second, first)
        assert pair == Pair(row["caption"], winner, loser, pair_id=i)


def test_what_is_dropped_is_counted_and_does_not_shift_the_others(tmp_path):
    rows = tiny.rows(12)
    jpeg = io.BytesIO()
    Image.new("RGB", (64, 64), "red").save(jpeg, "jpeg")
    rows[0] |= {"label_0": 0.5, "label_1": 0.5}
    rows[1] |= {"has_label": False}
    rows[2] |= {"label_0": None}
    rows[3] |= {"jpg_0": b"no image at all"}
    rows[4] |= {"jpg_1": jpeg.getvalue()[:-40]}
    rows[5] |= {"jpg_1": None}
    rows[6] |= {"label_0": 0.7, "label_1": 0.3}
    rows[7] |= {"caption": None}
    rows[8] |= {"label_0": 0.0, "label_1": 0.0}
    table = load(tmp_path, rows)
    assert [pair.pair_id for pair in table.pairs] == [9, 10, 11]
    assert table.rows == 12
    assert table.dropped == {
        "tied": 2,
        "unlabelled": 2,
        "with an undecodable image (UnidentifiedImageError)": 1,
        "with an undecodable image (OSError)": 1,
        "without an image": 1,
        "with labels other than 0 and 1": 1,
        "without a caption": 1,
    }
    assert str(table).startswith("3 pairs of 12 rows (dropped: 2 tied, 2 unlabelled, 1 ")


def test_images_may_be_structs_and_has_label_may_be_absent(tmp_path):
    rows = [
        {key: value for key, value in row.items() if key != "has_label"}
        | {name: {"bytes": row[name], "path": None} for name in ("jpg_0", "jpg_1")}
        for row in tiny.rows(3)
    ]
    assert load(tmp_path, rows).pairs == load(tmp_path, tiny.rows(3)).pairs


def test_limit_counts_pairs(tmp_path):
    rows = tiny.rows(6)
    rows[0] |= {"label_0": 0.5, "label_1": 0.5}
    table = load(tmp_path, rows, limit=2)
    assert [pair.pair_id for pair in table.pairs] == [1, 2]


def test_a_folder_has_splits(tmp_path):
    (tmp_path / "data").mkdir()
    for name, count in (("train-00001", 3), ("train-00000", 2), ("test-00000", 4)):
        tiny.write_pairs(tmp_path / "data" / f"{name}-of-2.parquet", tiny.rows(count))
    table = load_pairs(tmp_path, "train")
    assert [pair.pair_id for pair in table.pairs] == list(range(5))
    assert table.pairs[:2] == load_pairs(tmp_path / "data/train-00000-of-2.parquet").pairs
    assert len(load_pairs(tmp_path, "test").pairs) == 4
    with pytest.raises(ValueError, match=r"split: expected .*'dev'.*got \['test', 'train'\]"):
        load_pairs(tmp_path, "dev")


def test_nothing_there(tmp_path):
    with pytest.raises(ValueError, match="pairs: expected a parquet file or a folder"):
        load_pairs(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="got no parquet file"):
        parquet_files(tmp_path, "train")


@pytest.mark.parametrize("column", ["caption", "jpg_0", "jpg_1", "label_0", "label_1"])
def test_a_missing_column_is_named(tmp_path, column):
    rows = [{key: value for key, value in row.items() if key != column} for row in tiny.rows(2)]
    with pytest.raises(ValueError, match=rf"pairs: expected columns .* without \['{column}'\]"):
        load(tmp_path, rows)


def test_a_file_broken_in_the_middle(tmp_path):
    path = tiny.write_pairs(tmp_path / "train.parquet", tiny.rows())
    data = bytearray(path.read_bytes())
    data[100:2000] = bytes(1900)
    path.write_bytes(data)
    with pytest.raises(ValueError, match="pairs: "):
        load_pairs(path)


def test_only_the_columns_needed_are_read(tmp_path):
    rows = tiny.rows(3)
    table = pa.Table.from_pylist(rows).append_column("huge", pa.array(["x"] * 3))
    path = tmp_path / "train.parquet"
    pq.write_table(table, path)
    data = bytearray(path.read_bytes())
    at = pq.ParquetFile(path).metadata.row_group(0).column(table.num_columns - 1).data_page_offset
    data[at : at + 8] = bytes(8)  # reading this column would fail
    path.write_bytes(data)
    with pytest.raises((OSError, pa.ArrowException)):
        pq.read_table(path)
    assert len(list(read_rows(path))) == 3


def test_transparent_pixels_lie_on_white():
    file = io.BytesIO()
    Image.new("RGBA", (2, 2), (255, 0, 0, 0)).save(file, "png")
    assert decode(file.getvalue()).getpixel((0, 0)) == (255, 255, 255)
    palette = Image.new("P", (2, 2))
    file = io.BytesIO()
    palette.save(file, "png", transparency=0)
    assert decode(file.getvalue()).getpixel((1, 1)) == (255, 255, 255)


def test_the_fingerprint_is_of_the_content(tmp_path):
    fingerprint = load(tmp_path, tiny.rows(4)).fingerprint()
    assert fingerprint == load(tmp_path, tiny.rows(4)).fingerprint()
    changes = ({"caption": "other"}, {"jpg_0": tiny.png(77)}, {"label_0": 1.0, "label_1": 0.0})
    for change in changes:
        rows = tiny.rows(4)
        rows[0] |= change
        assert load(tmp_path, rows).fingerprint() != fingerprint
    assert load(tmp_path, tiny.rows(4)[::-1]).fingerprint() != fingerprint
