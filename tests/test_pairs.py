"""Which kind of source a path is, and what is none."""

import pytest
import tiny

from dde_fast.pairs import KINDS, open_source


def test_nothing_there(tmp_path):
    for spec in (tmp_path / "nowhere", tmp_path / "a.parquet", ""):
        with pytest.raises(ValueError, match="pairs: expected .* where there is nothing"):
            open_source(spec)


def test_what_is_none_of_the_kinds(tmp_path):
    (tmp_path / "file").write_text("{not json")
    for path in (tmp_path, tmp_path / "file"):
        with pytest.raises(ValueError, match="which is none of them") as why:
            open_source(path)
        assert all(kind.description in str(why.value) for kind in KINDS)


@pytest.mark.parametrize("url", ["nonsense://there", "memory://not/there.parquet"])
def test_a_url_that_cannot_be_read(url):
    with pytest.raises(ValueError, match=f"pairs: expected .* got '{url}'"):
        open_source(url)


def test_parquet_needs_no_suffix(tmp_path):
    path = tiny.write_pairs(tmp_path / "blob", tiny.rows(3))
    assert len(list(open_source(path).rows())) == 3


def test_linked_files_and_folders_are_followed(tmp_path):
    (tmp_path / "snapshot").mkdir()
    tiny.write_pairs(tmp_path / "blob", tiny.rows(3))
    (tmp_path / "snapshot/train-0.parquet").symlink_to(tmp_path / "blob")
    (tmp_path / "link").symlink_to(tmp_path / "snapshot")
    assert len(list(open_source(tmp_path / "link").rows())) == 3
