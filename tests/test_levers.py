"""A measured training step: its table, its waterfall, and what is refused."""

import json

import pytest
from matplotlib.colors import to_rgba
from report_folders import step_result, write_step

from dde_fast import levers
from dde_fast.figures import COLOURS, SOFT


def test_a_row_says_what_a_lever_made_of_the_step():
    rows = levers.cells(step_result())
    assert all(len(row) == len(levers.HEAD) for row in rows)
    published, scored = rows[0], rows[-1]
    expected = [
        "published structure",
        "20 [16, 25]",
        "1.00",
        "20 %",
        "0.125 + 1.5 + 0.25",
        "5",
        "0 %",
    ]
    assert published == expected
    expected = ["+ reference scores", "40 [32, 50]", "2.00", "40 %", "0.5 + 1.5 + 0", "2", "0.75 %"]
    assert scored == expected


def test_what_an_older_or_unfinished_file_lacks_is_a_dash(tmp_path):
    """Files from before the state was counted, and those of a run that was cut off in its rounds."""
    result = step_result()
    for row in result["rows"]:
        del row["state_GiB"], row["data_wait"]
    (tmp_path / "step.json").write_text(json.dumps(result))
    row = levers.cells(levers.read(tmp_path / "step.json").result)[0]
    assert (row[4], row[6]) == ("0.125 + – + 0.25", "–")


def test_a_result_without_the_published_structure_compares_with_nothing(tmp_path):
    """Where a GPU's memory does not suffice for it, which is said."""
    result = step_result()
    del result["rows"][0]
    for row in result["rows"]:
        del row["times_published"]
    result["failed"] = {"published structure": "CUDA out of memory."}
    (tmp_path / "step.json").write_text(json.dumps(result))
    found = levers.read(tmp_path / "step.json").result
    assert {row[2] for row in levers.cells(found)} == {"–"}
    assert levers.place(found).endswith("; published structure failed: CUDA out of memory.")
    assert "40, –×, 40 %" in {text.get_text() for text in levers.waterfall(found).axes[0].texts}


def test_micro_batches_are_told_where_a_step_has_several():
    assert levers.batch_of(step_result()) == "16 pairs"
    result = step_result(micro_batches=4, pairs_per_micro_batch=4)
    assert levers.batch_of(result) == "4 × 4 pairs"
    assert levers.middle_half(result, result["rows"][0]) == pytest.approx((16, 25))


def test_launches_are_told_where_a_gpu_counted_them():
    result = step_result()
    result["rows"][1]["launches"] = 1234
    result["rows"][2]["launches"] = None  # it saw none
    hosts = [row[5] for row in levers.cells(result)]
    assert hosts == ["5", "4, 1,234 launches", "3", "2"]


def test_the_waterfall_rises_lever_by_lever():
    """Of each bar: what was there before in grey, what a lever adds or costs in colour, the middle half
    of the rounds across its end, and what it comes to beside it."""
    (axes,) = levers.waterfall(step_result()).axes
    bars = [(bar.get_x(), bar.get_width(), bar.get_facecolor()) for bar in axes.patches]
    assert [(left, width) for left, width, _ in bars] == [
        *[(0, 0), (0, 20)],
        *[(0, 20), (20, 12)],
        *[(0, 25), (25, 7)],
        *[(0, 25), (25, 15)],
    ]
    colours = [axes.patches[i].get_facecolor() for i in (1, 3, 5, 7)]
    names = ("other", "dde", "diffusion-dpo", "dde")
    assert colours == [to_rgba(COLOURS[name][0]) for name in names]
    assert {bar[2] for bar in bars[::2]} == {to_rgba(SOFT)}
    lines = [list(line.get_xdata()) for line in axes.lines]
    assert lines == [pytest.approx([0.8 * rate, 1.25 * rate]) for rate in (20, 32, 25, 40)]
    said = [text.get_text().strip() for text in axes.texts]
    assert said == ["20, 1.00×, 20 %", "32, 1.60×, 32 %", "25, 1.25×, 25 %", "40, 2.00×, 40 %"]
    names = [label.get_text().replace("\n", " ") for label in axes.get_yticklabels()]
    assert names[0] == "published structure" and names[-1] == "+ reference scores"
    assert axes.get_ylim()[0] > axes.get_ylim()[1]  # the published structure on top
    assert "commit c0ffee" in axes.get_xlabel()


def test_a_result_is_known_by_what_it_says(tmp_path):
    assert levers.is_result(write_step(tmp_path / "step.json"))
    (tmp_path / "evaluation.json").write_text('{"results": {"base": {}}}')
    (tmp_path / "torn.json").write_text('{"case": "embedded", "rows": [')
    (tmp_path / "bytes.json").write_bytes(b"\xff\xfe")
    for name in ("evaluation.json", "torn.json", "bytes.json", "nowhere", "."):
        assert not levers.is_result(tmp_path / name), name


BROKEN = {
    "no rows": lambda result: result["rows"].clear(),
    "rows are no list": lambda result: result.update(rows=3),
    "no machine": lambda result: result.pop("machine"),
    "no commit": lambda result: result["machine"].pop("commit"),
    "no name": lambda result: result["rows"][1].pop("name"),
    "no quartile": lambda result: result["rows"][1]["seconds"].pop("upper_quartile"),
    "no seconds": lambda result: result["rows"][1]["seconds"].update(lower_quartile=0),
    "no rate": lambda result: result["rows"][1].update(pairs_per_s=0.0),
    "nan": lambda result: result["rows"][1].update(share_of_arithmetic=float("nan")),
    "no micro-batch": lambda result: result.update(micro_batches=0),
    "negative state": lambda result: result["rows"][1].update(state_GiB=-1.0),
    "text for a wait": lambda result: result["rows"][1].update(data_wait="long"),
    "text": lambda result: result["rows"][1].update(step_GiB="much"),
    "number for a name": lambda result: result["rows"][1].update(name=1),
}


@pytest.mark.parametrize("change", BROKEN.values(), ids=BROKEN)
def test_a_damaged_result_is_refused_by_its_name(tmp_path, change):
    result = step_result()
    change(result)
    (tmp_path / "step.json").write_text(json.dumps(result))
    with pytest.raises(ValueError, match=r"^runs: expected .*step\.json"):
        levers.read(tmp_path / "step.json")
