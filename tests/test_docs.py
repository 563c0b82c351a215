"""The pages under docs/: what they name exists, and their numbers are the committed ones."""

import dataclasses
import json
import re
import sys
from pathlib import Path

import pytest
import torch

from dde_fast import metrics
from dde_fast.config import TrainConfig
from dde_fast.loss import PreferenceOutput

DOCS = Path(__file__).parent.parent / "docs"
PAGE = (DOCS / "is-it-learning.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("page", sorted(DOCS.glob("*.md")), ids=lambda page: page.name)
def test_pictures_are_there_and_small(page):
    pictures = re.findall(r"!\[.+?\]\((.+?)\)", page.read_text(encoding="utf-8"))
    for name in pictures:
        assert (DOCS / name).stat().st_size < 150_000, name


def test_flags_that_the_page_names_exist():
    flags = set(re.findall(r"--(\w+)", PAGE.replace("<!--", "")))
    assert len(flags) > 5
    assert flags <= {field.name for field in dataclasses.fields(TrainConfig)}


def test_the_table_is_made_from_the_committed_numbers(monkeypatch):
    monkeypatch.syspath_prepend(str(DOCS))
    monkeypatch.delitem(sys.modules, "is_it_learning", raising=False)
    import is_it_learning

    result = json.loads((DOCS / "is-it-learning.json").read_text(encoding="utf-8"))
    block = re.search(r"<!-- table -->\n(.*?)<!-- /table -->", PAGE, re.S).group(1)
    assert block == is_it_learning.table(result)
    assert result["runs"].keys() == is_it_learning.RUNS.keys()


def test_the_page_explains_what_is_logged_and_nothing_else(tmp_path, monkeypatch):
    monkeypatch.setattr(metrics.dist, "get_rank", lambda: 0)
    monkeypatch.setattr(metrics.dist, "all_reduce", lambda tensor: None)
    meter = metrics.Meter(torch.device("cpu"), 1000)
    one, two, t = torch.ones(1), torch.ones(2), torch.zeros(1, dtype=torch.int64)
    meter.observe(PreferenceOutput(torch.ones(()), one, two, two, one, t))
    meter.add({"grad_norm": 1.0})
    log = metrics.RunLog(tmp_path, {}, steps=1, start=0, batch=1, pairs_at_peak=1.0)
    record = meter.read({"skipped_steps": torch.zeros(())})
    log.write(1, record | {"validation": {}}, 1e-4, warning="a warning")
    log.close()
    logged = json.loads((tmp_path / "metrics.jsonl").read_text()).keys()
    table = PAGE.split("| name | what it is |")[1].split("\n\n")[0]
    rows = [line.split("|")[1] for line in table.splitlines()[2:]]
    explained = {name for row in rows for name in re.findall(r"`(\w+)`", row)}
    assert explained == logged - {"step", "learning_rate", "warning"}
