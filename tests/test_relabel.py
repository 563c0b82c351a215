"""Pairs labelled anew: what is kept, what is written, and that training reads it."""

import json

import numpy as np
import pair_files
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny
import torch
from PIL import Image

from dde_fast import evaluate, images, inputs, relabel, rewards, shards
from dde_fast.config import TrainConfig
from dde_fast.pairs import Pair, open_source
from dde_fast.prepare import Preparation

CPU = torch.device("cpu")
pytestmark = pytest.mark.usefixtures("one_thread")


def rows(count: int = 12) -> list[dict]:
    """As Pick-a-Pic has them, images of several sizes; the 3rd is a tie, 5 and 6 cannot be read."""
    found = []
    for i, row in enumerate(tiny.rows()):
        uids = {"image_0_uid": f"zero-{i}", "image_1_uid": f"one-{i}"}
        found.append(row | uids | {"best_image_uid": "old", "model_0": f"m{i}", "user_id": i})
        found[-1] |= {"jpg_0": tiny.png(i, 8 + i % 3)}
    found[3] |= {"jpg_1": found[3]["jpg_0"]}
    found[5] |= {"jpg_1": b"no image"}
    found[6] |= {"caption": " "}
    found[7] |= {"label_0": 0.5, "label_1": 0.5, "has_label": False}
    return found[:count]


def write(path, table: list[dict], group: int = 5):
    pq.write_table(pa.Table.from_pylist(table), path, row_group_size=group)
    return path


def label(pairs, output, *specs: str, batch: int = 4) -> str:
    return relabel.relabel(str(pairs), "train", specs or ["colourfulness"], output, batch, CPU)


def result(output) -> list[dict]:
    return [
        row for path in sorted(output.glob("*.parquet")) for row in pq.read_table(path).to_pylist()
    ]


def colour(data: bytes) -> float:
    pixels = torch.from_numpy(np.array(images.decode(data))).permute(2, 0, 1)[None].float() / 255
    return rewards.load_reward("colourfulness")(pixels, ["face"]).item()


def test_labels_follow_the_scores_and_the_rest_stays(tmp_path):
    table = rows()
    said = label(
        write(tmp_path / "train.parquet", table), tmp_path / "out", "colourfulness", "sentiment"
    )
    reasons = {5: "undecodable image", 6: "without a caption"}
    words = ", ".join(f"1 {reason}" for reason in reasons.values())
    assert said == f"relabelled: 12 pairs, 1 tied, unlabelled: {words} in {tmp_path / 'out'}"
    names = sorted(path.name for path in (tmp_path / "out").glob("*.parquet"))
    assert names == [f"train-{i:05d}-of-00003.parquet" for i in range(3)]
    found = result(tmp_path / "out")
    anew = {"label_0", "label_1", "best_image_uid", "has_label"}
    for i, (before, after) in enumerate(zip(table, found, strict=True)):
        assert {k: after[k] for k in before if k not in anew} == {
            k: v for k, v in before.items() if k not in anew
        }
        labels = after["label_0"], after["label_1"], after["best_image_uid"], after["has_label"]
        assert after["unlabelled"] == reasons.get(i)
        if i in (5, 6):
            assert labels == (None, None, None, False) and after["sentiment_1"] is None
            continue
        zero, one = colour(before["jpg_0"]), colour(before["jpg_1"])
        assert after["colourfulness_0"] == pytest.approx(zero, rel=1e-5)
        assert after["colourfulness_1"] == pytest.approx(one, rel=1e-5)
        expected = (1.0, 0.0, f"zero-{i}") if zero > one else (0.0, 1.0, f"one-{i}")
        assert labels == ((0.5, 0.5, "tie") if i == 3 else expected) + (True,)
        assert -1 <= after["sentiment_0"] <= 1
    assert len({row["label_0"] for row in found}) == 4


def test_what_is_written_is_a_source_for_training(tmp_path):
    table = rows()
    label(write(tmp_path / "train.parquet", table), tmp_path / "out")
    source = open_source(tmp_path / "out", "train")
    found = list(source.rows())
    reasons = {row.pair_id: row.reason for row in found if not isinstance(row, Pair)}
    assert reasons == {3: "tied", 5: "unlabelled", 6: "unlabelled"}
    for pair in found:
        if isinstance(pair, Pair):
            winner, loser = source.read([pair.winner.place, pair.loser.place])
            before = table[pair.pair_id]
            assert sorted([winner, loser]) == sorted([before["jpg_0"], before["jpg_1"]])
            assert colour(winner) > colour(loser)


def test_a_cache_is_prepared_from_it(tmp_path, encoders):
    import caches

    label(write(tmp_path / "train.parquet", rows()), tmp_path / "out")
    folder = caches.prepare(encoders, tmp_path / "out", tmp_path / "cache", min_side=1)
    assert json.loads((folder / "manifest.json").read_text())["counts"]["pairs"] == 9


def test_other_sources_are_written_in_pick_a_pics_columns(tmp_path, monkeypatch):
    monkeypatch.setattr(relabel, "PART", 2)
    pair_files.images(tmp_path / "images", 6)
    lines = [{"caption": f"c{i}", "winner": f"{i}.png", "loser": f"{i + 1}.png"} for i in range(5)]
    text = "\n".join(map(json.dumps, [*lines[:2], {"caption": "", "winner": "0.png"}, *lines[2:]]))
    pair_files.put(tmp_path / "train.jsonl", text)
    said = label(tmp_path / "train.jsonl", tmp_path / "out")
    left_out = "; left out: 1 without a caption"
    assert said == f"relabelled: 5 pairs, 0 tied in {tmp_path / 'out'}{left_out}"
    (record,) = map(json.loads, (tmp_path / "out/rejected.jsonl").read_text().splitlines())
    assert (record["pair_id"], record["reason"]) == (2, "without a caption")
    assert len(list((tmp_path / "out").glob("*.parquet"))) == 3
    found = result(tmp_path / "out")
    assert [row["caption"] for row in found] == [f"c{i}" for i in range(5)]
    assert [row["ranking_id"] for row in found] == [0, 1, 3, 4, 5]
    for i, row in enumerate(found):
        assert (row["jpg_0"], row["jpg_1"]) == (tiny.png(i), tiny.png(i + 1))
        assert (row["image_0_uid"], row["image_1_uid"]) == (
            pair_files.sha(i),
            pair_files.sha(i + 1),
        )
        best = (
            row["image_0_uid"]
            if colour(tiny.png(i)) > colour(tiny.png(i + 1))
            else row["image_1_uid"]
        )
        assert row["best_image_uid"] == best
    assert {row["label_0"] for row in found} == {0.0, 1.0}
    assert sum(isinstance(row, Pair) for row in open_source(tmp_path / "out").rows()) == 5


def test_images_in_structs_and_columns_that_are_not_there(tmp_path):
    table = [
        {k: row[k] for k in ("caption", "label_0", "label_1")}
        | {f"jpg_{s}": {"bytes": row[f"jpg_{s}"], "path": None} for s in (0, 1)}
        for row in tiny.rows(4)
    ]
    label(write(tmp_path / "train.parquet", table), tmp_path / "out")
    found = result(tmp_path / "out")
    assert "best_image_uid" not in found[0] and found[0]["has_label"] is True
    assert sum(isinstance(row, Pair) for row in open_source(tmp_path / "out").rows()) == 4


@pytest.mark.parametrize("call", ["replace", "fsync"])
def test_a_failure_at_any_write_loses_nothing(tmp_path, monkeypatch, call):
    pairs, real = write(tmp_path / "train.parquet", rows()), getattr(shards.os, call)
    label(pairs, tmp_path / "whole")
    expected, scored = result(tmp_path / "whole"), []
    count = relabel.Labeller.__call__
    monkeypatch.setattr(
        relabel.Labeller, "__call__", lambda self, t: scored.append(len(t)) or count(self, t)
    )
    for n in range(20):
        left = iter(range(n))

        def failing(*args, left=left):
            if next(left, None) is None:
                raise OSError(28, "No space left on device")
            return real(*args)

        monkeypatch.setattr(shards.os, call, failing)
        try:
            label(pairs, tmp_path / str(n))
            break
        except OSError:
            there = list((tmp_path / str(n)).glob("*"))
            assert all(path.suffix in (".parquet", ".json") for path in there)
        monkeypatch.setattr(shards.os, call, real)
        done = sum(pq.read_metadata(p).num_rows for p in there if p.suffix == ".parquet")
        scored.clear()
        label(pairs, tmp_path / str(n))
        assert sum(scored) == 12 - done
        assert result(tmp_path / str(n)) == expected
    assert n == (4 if call == "replace" else 8)  # settings and three parts


def test_processes_share_the_parts(tmp_path, monkeypatch):
    pairs = write(tmp_path / "train.parquet", rows())
    label(pairs, tmp_path / "alone")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    said = label(pairs, tmp_path / "shared")
    assert said == "part 1 of 2 is done; 2 of 3 files are still missing"
    monkeypatch.setenv("RANK", "0")
    assert label(pairs, tmp_path / "shared").startswith("relabelled: 12 pairs")
    assert result(tmp_path / "shared") == result(tmp_path / "alone")


def test_other_pairs_and_rewards_need_another_folder(tmp_path):
    pairs = write(tmp_path / "train.parquet", rows())
    label(pairs, tmp_path / "out")
    with pytest.raises(
        ValueError, match="holds relabelled pairs of other settings: expected rewards"
    ):
        label(pairs, tmp_path / "out", "prompt_match")
    with pytest.raises(ValueError, match="of other settings: expected source"):
        label(write(tmp_path / "other.parquet", rows(4)), tmp_path / "out")


def test_wrong_input_is_named(tmp_path, monkeypatch):
    pairs = write(tmp_path / "train.parquet", rows(4))
    for specs in (["distinct"], ["colourfulness", "colourfulness"]):
        with pytest.raises(ValueError, match="rewards: expected different ones that score single"):
            label(pairs, tmp_path / "out", *specs)
    for split in ("../train", "train,test"):
        with pytest.raises(ValueError, match="split: expected one word of letters"):
            relabel.relabel(str(pairs), split, ["colourfulness"], tmp_path / "out", 4, CPU)
    empty = write(tmp_path / "empty.parquet", rows(4))
    pq.write_table(pq.read_table(empty).slice(0, 0), empty)
    with pytest.raises(ValueError, match="relabel: expected at least one pair"):
        label(empty, tmp_path / "out")
    pair_files.put(tmp_path / "train.jsonl", '{"caption": "", "winner": "0.png", "loser": "1.png"}')
    with pytest.raises(ValueError, match="at least one pair, got none .*: 1 without a caption"):
        label(tmp_path / "train.jsonl", tmp_path / "out")
    scorer = rewards.load_reward("colourfulness")
    monkeypatch.setattr(
        type(scorer), "each", lambda self, images, prompts: images.mean((1, 2, 3)) / 0
    )
    with pytest.raises(ValueError, match="rewards: expected finite scores of colourfulness"):
        label(pairs, tmp_path / "out")
    assert not list((tmp_path / "out").glob("*.par*"))


def test_what_was_relabelled_is_trained_on(tmp_path):
    label(write(tmp_path / "train.parquet", rows()), tmp_path / "out")
    decided = [
        row for row in result(tmp_path / "out") if {row["label_0"], row["label_1"]} == {0, 1}
    ]
    c = TrainConfig(pairs=str(tmp_path / "out"), output=str(tmp_path / "run"))
    data = inputs.open_pairs(c, c.pairs, "train", 0)
    assert isinstance(data, Preparation) and len(decided) == 9
    assert str(data).startswith("9 pairs of ")


def test_the_command(tmp_path, capsys):
    pairs = write(tmp_path / "train.parquet", rows(4))
    args = ["--relabel", str(pairs), "--rewards", "colourfulness", "--device", "cpu"]
    evaluate.main([*args, "--output", str(tmp_path / "out")])
    assert "relabelled: 4 pairs, 1 tied" in capsys.readouterr().out
    ignored = {"limit": "3", "aligned": "a=embedded", "prompts": "style", "seed": "1"}
    for name, value in ignored.items():
        with pytest.raises(SystemExit) as stop:
            evaluate.main([*args, f"--{name}", value, "--output", str(tmp_path / "bad")])
        error = capsys.readouterr().err
        assert stop.value.code == 2 and error.count("\n") == 1
        assert f"{name}: expected its default with --relabel, got " in error
    assert not (tmp_path / "bad").exists()


def test_pixels_are_those_of_the_image(tmp_path):
    """Not squared, not cropped: a reward does its own preparation."""
    pixels = np.random.default_rng(0).integers(0, 256, (6, 9, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    data = (tmp_path / "a.png").read_bytes()
    caption, first, second = relabel._readable(b"a", data, {"bytes": data})
    assert caption == "a" and torch.equal(first, second)
    assert torch.equal(first, torch.from_numpy(pixels).permute(2, 0, 1))
