"""README's results from the committed JSON: `python benchmarks/results_table.py` rewrites them."""

from __future__ import annotations

import json
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
MARKERS = re.compile(r"(<!-- results -->\n).*?(<!-- /results -->)", re.S)

TITLES = {
    "faces": '`make demo`: 256 images of the prompt "face", equal seeds',
    "style": "`make demo PRESET=style`: 256 images of held-out names, equal seeds",
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


def render(results: Path = RESULTS) -> str:
    """The block between README's markers."""
    lines = [""]
    for name in TITLES:
        path = results / f"{name}.json"
        if path.exists():
            lines += evaluation(name, json.loads(path.read_text(encoding="utf-8")))
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
