"""README's results from the committed JSON: `python benchmarks/results_table.py` rewrites them."""

from __future__ import annotations

import json
import re
from pathlib import Path

from kernel_table import kernels
from step_table import whole_steps

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
MARKERS = re.compile(r"(<!-- results -->\n).*?(<!-- /results -->)", re.S)

TITLES = {
    "faces": '`make demo`: 256 images of the prompt "face", equal seeds',
    "style": "`make demo PRESET=style`: 8 images of each of 31 held-out names, equal seeds",
}


def evaluation(name: str, result: dict) -> list[str]:
    """One comparison as a Markdown table, a row per reward and model."""
    versions = result["versions"]
    lines = [
        f"**{TITLES[name]}.** Commit `{result['commit'][:12]}`, {versions['machine']}, "
        f"torch {versions['torch']}.",
        "",
        "| reward | model | mean ± std | win / tie / lose, % | difference to base [95 %] |",
        "|---|---|---|---|---|",
    ]
    for reward in result["results"]["base"]:
        for model, entries in result["results"].items():
            entry = entries[reward]
            mean = f"{entry['mean']:.3f} ± {entry['std']:.3f}" if "std" in entry else ""
            shares = difference = ""
            if "win" in entry:
                shares = " / ".join(f"{100 * entry[k]:.0f}" for k in ("win", "tie", "lose"))
                low, high = entry["interval"]
                difference = f"{entry['difference']:+.3f} [{low:+.3f}, {high:+.3f}]"
            elif "difference" in entry:
                difference = f"{entry['difference']:+.0f}"
            lines.append(
                f"| {reward} | {model} | {mean or round(entry['mean'])} | {shares} | {difference} |"
            )
    return [*lines, ""]


def picture(path: Path, about: str) -> list[str]:
    return [f"![{about}](benchmarks/results/{path.name})", ""] if path.exists() else []


def reading(data: dict) -> list[str]:
    """One machine's reading of a prepared cache as a Markdown table."""
    machine, infos = data["machine_info"], [row["extra_info"] for row in data["benchmarks"]]
    what = {
        "loader": "`dde_fast.loader.Loader`",
        "at_once": "the same without its thread",
        "dataloader": "PyTorch's DataLoader, one worker, the same files",
    }
    lines = [
        f"**Reading a prepared cache of SD 1.5 on {machine['device']}, {machine['threads']} "
        f"threads.** Commit `{data['commit_info']['id']}`, torch {machine['versions']['torch']}. "
        f"Batches of {infos[0]['batch']} out of the page cache, posterior sampled; median of one run.",
        "",
        "| | pairs per second |",
        "|---|---|",
    ]
    speeds = {info["name"]: info["pairs_per_s"] for info in infos}
    return [*lines, *(f"| {what[name]} | {speeds[name]:,.0f} |" for name in what), ""]


def place_and_date(result: dict) -> str:
    """What the numbers of an experiment were made with."""
    versions = result["versions"]
    return f"Commit `{result['commit'][:12]}`, {versions['machine']}, torch {versions['torch']}."


def span(value: float, interval: list[float] | None, digits: int, sign: str = "+") -> str:
    """A difference, or with no sign a mean, with its interval."""
    text, *ends = (f"{x:{sign}.{digits}f}" for x in (value, *(interval or [])))
    return f"{text} [{', '.join(ends)}]" if ends else text


def digits_of(result: dict) -> int:
    """Of a reward: three significant ones of its base."""
    return 3 if abs(result["base"][result["reward"]]) < 10 else 1


def beyond_limits(task: dict, protocol: dict) -> list[str]:
    """The methods whose results, on the reported images, the selection would not have admitted."""
    base = task["base"]
    least = {
        "prompt_match": base["prompt_match"] - protocol["max_match_lost"],
        "distinct": base["distinct"] * protocol["min_distinct"],
    }
    rows = ((name, key, row[key]) for name, row in task["methods"].items() for key in least)
    return [f"{name} ({key})" for name, key, value in rows if value < least[key]]


def objectives(result: dict) -> list[str]:
    """The comparison of objectives as Markdown: a table per task, and which of them are apart."""
    protocol, lines = result["protocol"], []
    for name, task in result["tasks"].items():
        reward, digits = task["reward"], digits_of(task)
        lines += [
            f"**Objectives on `{name}`: {task['about']}.** Means of {len(protocol['seeds'])} training "
            f"seeds, {protocol['steps']} steps of {protocol['pairs_per_step']} pairs, "
            f"{protocol['samples']} images each; [95 % t-interval over the seeds]. "
            + place_and_date(result),
            "",
            f"| method | learning rate, beta | {reward} | difference to base | win / tie / lose, % "
            "| prompt_match | distinct | winner error, × reference |",
            "|---|---|---|---|---|---|---|---|",
        ]
        for method, row in (("base", task["base"]), *task["methods"].items()):
            setting = shares = difference = ratio = ""
            if method != "base":
                setting = ", ".join(f"{v:g}" for v in reversed(row["setting"].values()))
                setting += "" if row["admissible"] else " (none admissible)"
                shares = " / ".join(f"{100 * row[key]:.0f}" for key in ("win", "tie", "lose"))
                difference = span(row["difference"], row["interval"], digits)
                ratio = f"{row['win_error_ratio']:.2f}" if "win_error_ratio" in row else ""
            lines.append(
                f"| {method} | {setting} | {row[reward]:.{digits}f} | {difference} | {shares} "
                f"| {row['prompt_match']:.3f} | {row['distinct']:.0f} | {ratio} |"
            )
        margins = [
            f"{row['margin_logit']:.0e} in those of {method} (mean size {row['logit_size']:.2g})"
            for method, row in task["methods"].items()
            if row["objective"] in ("dde", "dde-step")
        ]
        lines += [
            "",
            f"{separable(task['comparisons'], digits)} Beyond the selection's limits here: "
            f"{', '.join(beyond_limits(task, protocol)) or 'none'}. The correction beta · m_t adds to "
            f"the logits at most {', '.join(margins)}.",
            "",
        ]
    if result["missing"]:
        lines += [f"Not run: {'; '.join(result['missing'])}.", ""]
    return lines


def separable(pairs: list[dict], digits: int) -> str:
    """Which two methods are apart."""
    apart = [
        (row["a"], row["b"], row["difference"], row["interval"])
        if row["difference"] > 0
        else (row["b"], row["a"], -row["difference"], [-x for x in reversed(row["interval"])])
        for row in pairs
        if row["apart"]
    ]
    said = [f"{a} over {b} {span(gap, interval, digits)}" for a, b, gap, interval in apart]
    return (
        f"Apart, of {len(pairs)} comparisons seed by seed at 95 % each, not corrected for their "
        f"number: {'; '.join(said) or 'none'}. No other two methods are separable."
    )


def tenths(result: dict) -> list[str]:
    """Which tenth of the trajectory to train, as a Markdown table."""
    reward, digits, protocol = result["reward"], digits_of(result), result["protocol"]
    seeds = len(protocol["seeds"])
    lines = [
        f"**Which timesteps to train: {result['objective']} on `{result['task']}`, a tenth at a "
        f"time.** Means of {seeds} training seed{'s' * (seeds > 1)} (each of them), "
        f"{protocol['steps']} steps, {protocol['samples']} images each; the base has "
        f"{result['base']['prompt_match']:.3f} prompt_match and {result['base']['distinct']:.0f} "
        f"distinct. {place_and_date(result)}",
        "",
        f"| timesteps | {reward}, difference to base | prompt_match | distinct |",
        "|---|---|---|---|",
    ]
    for row in (*result["tenths"], {"low": 0, "high": 1000} | result["whole"]):
        each = ", ".join(f"{difference:+.{digits}f}" for difference in row["differences"])
        lines.append(
            f"| {row['low']}-{row['high'] - 1} | {row['difference']:+.{digits}f} ({each}) "
            f"| {row['prompt_match']:.3f} | {row['distinct']:.0f} |"
        )
    if result["missing"]:
        lines += ["", f"Not run: {'; '.join(result['missing'])}."]
    return [*lines, ""]


def online(result: dict) -> list[str]:
    """Online objectives and DDE as Markdown: a table per reward, then orders and guidance."""
    protocol, lines = result["protocol"], []
    for name, task in result["tasks"].items():
        first = next(iter(task["methods"].values()))
        budget = first["curve"][-1]["samples"]
        reward, digits = task["reward"], digits_of(task)
        others = [key for key in ("human_score",) if key in task["base"]]
        lines += [
            f"**Online objectives, rewarded by `{name}`.** Means over training seeds "
            f"after {budget:,} UNet samples each, {protocol['samples']} images each; [95 % "
            f"t-interval over the seeds]. {place_and_date(result)}",
            "",
            f"| objective | steps, seeds | {reward} | difference to base | win / tie / lose, % "
            f"| {' | '.join([*others, 'prompt_match', 'distinct'])} |",
            "|" + "---|" * (7 + len(others)),
        ]
        for method, row in (("base", task["base"]), *task["methods"].items()):
            curve = row.get("curve") or first["curve"][:1]
            steps = shares = difference = ""
            if method != "base":
                steps = f"{row['steps']}, {row['seeds']}"
                shares = " / ".join(f"{100 * row[key]:.0f}" for key in ("win", "tie", "lose"))
                difference = span(row["difference"], row["interval"], digits)
            rest = [f"{row[key]:.3f}" for key in (*others, "prompt_match")]
            lines.append(
                f"| {method} | {steps} | {span(curve[-1]['mean'], curve[-1]['interval'], digits, '')} "
                f"| {difference} | {shares} | {' | '.join(rest)} | {row['distinct']:.0f} |"
            )
        beyond = ", ".join(beyond_limits(task, protocol)) or "none"
        said = [raised(task, reward), separable(task["comparisons"], digits)]
        lines += ["", f"{' '.join(said)} Beyond the selection's limits here: {beyond}.", ""]
        if "orders" in task:
            lines += [orders(task["orders"], protocol), ""]
    if result["missing"]:
        lines += [f"Not run: {'; '.join(result['missing'])}.", ""]
    return lines


def other_noise(result: dict) -> list[str]:
    """The same UNets on noise that no training trajectory began at, as a sentence."""
    means = {
        task: ", ".join(
            f"{name} {sum(row[task] for row in rows) / len(rows):.{3 if task == 'sentiment' else 1}f}"
            for name, rows in methods.items()
        )
        for task, methods in result["tasks"].items()
    }
    return [
        f"The online runs of these tables began their trajectories at the noise of {result['of']}, as "
        "online runs no longer do. On other noise the UNets of seeds 1 to 3 get "
        + "; ".join(f"{task} {text}" for task, text in means.items())
        + f". Commit `{result['commit'][:12]}`.",
        "",
    ]


def raised(task: dict, reward: str) -> str:
    """For how many seeds the reward ends above its start."""
    above = [
        f"{name} {sum(x['end'][0] > x['start'][1] for x in row['images'])} of {len(row['images'])}"
        for name, row in task["methods"].items()
    ]
    return (
        f"Seeds whose {reward} ends with its bootstrap interval over the images above the base's: "
        f"{', '.join(above)}."
    )


def orders(rows: list[dict], protocol: dict) -> str:
    """How often orders disagree along the base's trajectories, and guidance helps."""

    def over(key: str) -> str:
        shares = [100 * row[key]["share"] for row in rows]
        return f"{shares[0]:.0f} % of cases at t = {rows[0]['t']}, {shares[-1]:.0f} % at {rows[-1]['t']}"

    return (
        f"Along {protocol['ordered']} trajectories of the base, two candidates of a step are ordered by "
        f"their stepwise reward unlike by an image that each leads to in {over('disagree')}; unlike by "
        f"the mean of {protocol['continuations']} images each in {over('disagree_mean')}. Two "
        "trajectories from one x_T are ordered at a step unlike at their end in "
        f"{over('trajectories_disagree')}. Guidance raises the winner's stepwise reward in "
        f"{over('guidance_raises')}."
    )


def read(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def experiments(results: Path) -> list[str]:
    """The comparison of objectives, of the tenths, and of the online objectives."""
    lines = []
    for path in results.glob("table2.json"):
        lines += objectives(read(path))
        lines += picture(path.with_suffix(".png"), "difference to the base by objective")
    for path in sorted(results.glob("figure3-*.json")):
        lines += tenths(read(path))
        lines += picture(path.with_suffix(".png"), "difference to the base by timesteps trained on")
    for path in results.glob("online.json"):
        lines += online(read(path))
        for other in results.glob("online-other-noise.json"):
            lines += other_noise(read(other))
        lines += picture(path.with_suffix(".png"), "reward by UNet samples, online and offline")
    return lines


def render(results: Path = RESULTS) -> str:
    """The block between README's markers."""
    lines = [""]
    for name, title in TITLES.items():
        path = results / f"{name}.json"
        if path.exists():
            lines += evaluation(name, json.loads(path.read_text(encoding="utf-8")))
            lines += picture(results / f"{name}-grid.png", title)
    lines += experiments(results)
    lines += kernels(results)
    for path in sorted(results.glob("data-*.json")):
        lines += reading(json.loads(path.read_text(encoding="utf-8")))
    lines += whole_steps(results)
    return "\n".join(lines) + "\n"


def main() -> None:
    readme = ROOT / "README.md"
    text = readme.read_text(encoding="utf-8")
    block = render()
    readme.write_text(
        MARKERS.sub(lambda match: match[1] + block + match[2], text), encoding="utf-8"
    )


if __name__ == "__main__":
    main()
