"""The runs and the pictures of is-it-learning.md: `python docs/is_it_learning.py`, minutes on 2 cores.

Trains the embedded model once in good health and once with each illness, draws each run's
`metrics.jsonl` (is-it-learning-NAME.png), copies the last grids of two of them and writes what the
page's table is made from (is-it-learning.json). `--draw` takes the runs as they are.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import numpy as np  # noqa: E402  (after the choice of a display-less backend)
import pyarrow as pa  # noqa: E402
import pyarrow.parquet as pq  # noqa: E402
from matplotlib import pyplot as plt  # noqa: E402

from dde_fast import embedded, evaluate  # noqa: E402

DOCS = Path(__file__).resolve().parent
FOLDER = DOCS.parent / "runs" / "is-it-learning"
COMMON = """--preset faces --steps 150 --log_every 5 --save_every 0 --validation_pairs faces
    --validation_limit 0 --validation_every 30 --grid_every 150""".split()
RUNS = {
    "healthy": [],
    "rate-too-high": ["--learning_rate", "5e-4"],
    "beta-too-large": ["--beta", "5000"],
    "random-labels": ["--pairs", str(FOLDER / "random-labels.parquet"), "--grid_prompts", "faces"],
}
"""Name -> what differs from the preset."""
GRIDS = ("healthy", "rate-too-high")
COLUMNS = {
    "accuracy": "{implicit_accuracy:.2f}",
    "held-out accuracy": "{held_out:.2f}",
    "winner error, × reference": "{win_ratio:.2f}",
    "loser error, × reference": "{lose_ratio:.2f}",
    "mean size of the logit": "{logit_size:.1f}",
    "loss": "{loss:.3g}",
}
"""Columns of the page's table."""


def write_random_labels(path: Path) -> None:
    """The training pairs with every label decided by a coin."""
    table = pq.read_table(embedded.pairs_path("faces", "train"))
    coins = np.random.default_rng(0).integers(0, 2, len(table)).astype(float)
    for name, labels in (("label_0", coins), ("label_1", 1 - coins)):
        table = table.set_column(table.column_names.index(name), name, pa.array(labels))
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path)


def train(name: str) -> None:
    """One run, from nothing."""
    output = FOLDER / name
    shutil.rmtree(output, ignore_errors=True)
    flags = [*COMMON, *RUNS[name], "--output", str(output)]
    flags += ["--deepspeed_config", str(DOCS.parent / "ds.json")]
    subprocess.run([sys.executable, "-m", "dde_fast.train", *flags], check=True)


def read(name: str) -> list[dict]:
    """The records of a run."""
    lines = (FOLDER / name / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def summary(records: list[dict]) -> dict[str, float]:
    """The last held-out look, and the mean of the last third of training."""
    late = records[-len(records) // 3 :]

    def mean(key: str) -> float:
        return float(np.mean([record[key] for record in late]))

    return {
        "implicit_accuracy": mean("implicit_accuracy"),
        "held_out": records[-1]["validation"]["implicit_accuracy"],
        "win_ratio": mean("policy_win_error") / mean("reference_win_error"),
        "lose_ratio": mean("policy_lose_error") / mean("reference_lose_error"),
        "logit_size": mean("logit_size"),
        "loss": mean("loss"),
    }


def draw(name: str, records: list[dict]) -> plt.Figure:
    """Accuracy, errors and logits over the steps, and the errors of the last third by timestep."""
    figure, (accuracy, errors, logits, bins) = plt.subplots(1, 4, figsize=(13, 2.9))
    steps = [record["step"] for record in records]
    looks = [record for record in records if "validation" in record]
    look_steps = [record["step"] for record in looks]
    held_out = [record["validation"] for record in looks]

    accuracy.plot(steps, [r["implicit_accuracy"] for r in records], color="0.7", label="training")
    accuracy.plot(look_steps, [v["implicit_accuracy"] for v in held_out], "o-", label="held-out")
    accuracy.axhline(0.5, color="k", lw=0.5)
    accuracy.set(title="implicit_accuracy", ylim=(0.3, 1.02), xlabel="step")

    for half, colour in (("win", "tab:green"), ("lose", "tab:red")):
        policy, reference = f"policy_{half}_error", f"reference_{half}_error"
        errors.plot(steps, [r[policy] / r[reference] for r in records], color=colour, alpha=0.3)
        ratios = [v[policy] / v[reference] for v in held_out]
        errors.plot(look_steps, ratios, "o-", color=colour, label=f"{half}, held-out")
        parts = {}
        for record in records[-len(records) // 3 :]:
            for part, pairs in record["by_timestep"]["pairs"].items():
                sums = parts.setdefault(part, [0.0, 0.0])
                for i, metric in enumerate((policy, reference)):
                    sums[i] += pairs * record["by_timestep"][metric][part]
        names = sorted(parts)
        bins.plot(
            [int(part.split("-")[0]) + 50 for part in names],
            [parts[part][0] / parts[part][1] for part in names],
            "o-",
            color=colour,
            label=half,
        )
    for axis, title, place in (
        (errors, "policy's error / reference's", "step"),
        (bins, "the last third by timestep", "timestep"),
    ):
        axis.axhline(1, color="k", lw=0.5)
        axis.set(title=title, xlabel=place)

    logits.plot(steps, [r["logit_size"] for r in records], color="tab:purple", label="logit_size")
    logits.plot(steps, [r["loss"] for r in records], color="tab:orange", label="loss")
    logits.axhline(np.log(2), color="k", lw=0.5)
    logits.set(title="loss and size of the logit", yscale="log", xlabel="step")
    for axis in (accuracy, errors, logits, bins):
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    figure.suptitle(f"{name}: {' '.join(RUNS[name][:2]) or 'the preset'}".replace(str(FOLDER), "…"))
    figure.tight_layout()
    return figure


def table(result: dict) -> str:
    """The page's table."""
    lines = ["| run | " + " | ".join(COLUMNS) + " |", "|---" * (len(COLUMNS) + 1) + "|"]
    for name, numbers in result["runs"].items():
        cells = (form.format(**numbers) for form in COLUMNS.values())
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    versions = result["versions"]
    where = f"{versions['machine']}, torch {versions['torch']}"
    return "\n".join([*lines, "", f"Commit `{result['commit'][:12]}`, {where}."]) + "\n"


def main() -> None:
    if "--draw" not in sys.argv:
        write_random_labels(FOLDER / "random-labels.parquet")
        made = {"commit": evaluate.git_commit(), "versions": evaluate.versions()}
        (FOLDER / "made.json").write_text(json.dumps(made), encoding="utf-8")
        for name in RUNS:
            train(name)
    result = {"runs": {}, **json.loads((FOLDER / "made.json").read_text(encoding="utf-8"))}
    for name in RUNS:
        records = read(name)
        result["runs"][name] = summary(records)
        draw(name, records).savefig(DOCS / f"is-it-learning-{name}.png", dpi=72)
    for name in GRIDS:
        last = max((FOLDER / name / "grids").iterdir())
        shutil.copyfile(last, DOCS / f"is-it-learning-{name}-grid.png")
    (DOCS / "is-it-learning.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    page = DOCS / "is-it-learning.md"
    before, _, rest = page.read_text(encoding="utf-8").partition("<!-- table -->\n")
    after = rest.partition("<!-- /table -->")[2]
    text = f"{before}<!-- table -->\n{table(result)}<!-- /table -->{after}"
    page.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
