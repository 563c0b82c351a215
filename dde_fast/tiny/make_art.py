"""Draw `art.parquet`: face emojis by five designers, as PNG bytes on white.

The drawings come from npm packages of the Iconify project, unpacked side by side in one folder:

    mkdir art && cd art
    npm pack @iconify-json/fluent-emoji-flat@1.2.6 @iconify-json/fluent-emoji-high-contrast@1.2.6 \\
        @iconify-json/noto@1.2.9 @iconify-json/fluent-emoji@1.2.7 @iconify-json/noto-v1@1.2.5
    for f in *.tgz; do mkdir "x_$f" && tar xzf "$f" -C "x_$f"; done
    pip install resvg-py==0.5.0
    python make_art.py --packages art

Roles: `base` drawings (32 px) are what the tiny model is trained on and what preference pairs show;
`judge` drawings (64 px) are faces by other designers, which only the judge sees; `other` drawings
(64 px) are no faces, and teach the judge what a face is not. Took 22 s on one core.
"""

import argparse
import io
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import resvg_py
from PIL import Image

BASE = {"flat": "fluent-emoji-flat", "line": "fluent-emoji-high-contrast", "noto": "noto"}
"""Designers the base model learns: name in `art.parquet` to package."""

JUDGE = {"3d": "fluent-emoji", "blob": "noto-v1"}
"""Designers that only the judge learns."""

BASE_PIXELS, JUDGE_PIXELS, OTHERS = 32, 64, 240

EXTRA_FACES = ("rolling-on-the-floor-laughing", "star-struck", "exploding-head")
NOT_FACES = ("dotted-line-face", "face-in-clouds")

BLOB_FACES = {"dizzy-face": "knocked-out-face"}
"""noto-v1 drew this one before Unicode renamed it."""

OTHER_CATEGORIES = (
    "Animals & Nature",
    "Food & Drink",
    "Activities",
    "Objects",
    "Symbols",
    "Travel & Places",
)


def load_package(root: Path, package: str) -> dict:
    """Read one unpacked package: `icons` (with aliases resolved), `chars`, `metadata`."""
    (folder,) = root.glob(f"*iconify-json-{package}-[0-9]*/package")
    icons = json.loads((folder / "icons.json").read_text())
    for alias, target in icons.get("aliases", {}).items():
        if set(target) == {"parent"} and target["parent"] in icons["icons"]:
            icons["icons"][alias] = icons["icons"][target["parent"]]
    metadata = json.loads((folder / "metadata.json").read_text())
    chars = json.loads((folder / "chars.json").read_text())
    return {"icons": icons, "chars": chars, "categories": metadata.get("categories", {})}


def draw(package: dict, name: str, pixels: int) -> bytes:
    """Rasterise one drawing on white at 4x and average down; returns PNG bytes, pixels x pixels
    RGB."""
    icons = package["icons"]
    icon = icons["icons"][name]
    box = [
        icon.get(k, icons.get(k, d))
        for k, d in zip(("left", "top", "width", "height"), (0, 0, 16, 16), strict=True)
    ]
    svg = (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="{" ".join(map(str, box))}">{icon["body"]}</svg>'
    )
    big = resvg_py.svg_to_bytes(
        svg_string=svg, width=4 * pixels, height=4 * pixels, background="white"
    )
    image = Image.open(io.BytesIO(bytes(big))).convert("RGB")
    out = io.BytesIO()
    image.resize((pixels, pixels), Image.Resampling.BOX).save(out, "PNG", optimize=True)
    return out.getvalue()


def face_codepoints(packages: dict[str, dict]) -> dict[str, str]:
    """Face emojis that every base designer and the judge's `3d` drew: Unicode name to codepoint
    (hex)."""
    flat = packages["flat"]
    codepoints = {name: code for code, name in flat["chars"].items() if "-" not in code}
    faces = {}
    for name in sorted(flat["categories"]["Smileys & Emotion"]):
        wanted = ("face" in name.split("-") or name in EXTRA_FACES) and name not in NOT_FACES
        code = codepoints.get(name)
        if not wanted or code is None or name not in packages["3d"]["icons"]["icons"]:
            continue
        if all(code in packages[d]["chars"] for d in BASE):
            faces[name] = code
    return faces


def rows(packages: dict[str, dict]) -> list[dict]:
    """Every drawing of `art.parquet`, in a fixed order."""
    faces = face_codepoints(packages)
    found = []

    def add(role: str, designer: str, source: str, name: str, code: str, pixels: int) -> None:
        png = draw(packages[designer], source, pixels)
        words = name.replace("-", " ")
        found.append(
            {"name": words, "designer": designer, "role": role, "codepoint": code, "png": png}
        )

    for designer in BASE:
        for name, code in faces.items():
            add("base", designer, packages[designer]["chars"][code], name, code, BASE_PIXELS)
    renamed = {"3d": {}, "blob": BLOB_FACES}
    for designer in JUDGE:
        icons = packages[designer]["icons"]["icons"]
        sources = {name: name for name in faces if name in icons}
        sources |= {name: source for source, name in renamed[designer].items()}
        for name, code in faces.items():
            if name in sources:
                add("judge", designer, sources[name], name, code, JUDGE_PIXELS)
    categories = packages["flat"]["categories"]
    shared = [
        name
        for category in OTHER_CATEGORIES
        for name in categories[category]
        if all(name in packages[d]["icons"]["icons"] for d in ("3d", "blob")) and "face" not in name
    ]
    codepoints = {name: code for code, name in packages["flat"]["chars"].items()}
    step = len(shared) / OTHERS
    for i in range(OTHERS):
        name = shared[int(i * step)]
        add("other", ("3d", "blob")[i % 2], name, name, codepoints.get(name, ""), JUDGE_PIXELS)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument(
        "--packages", type=Path, required=True, help="folder with the unpacked packages"
    )
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "art.parquet")
    args = parser.parse_args()
    packages = {
        name: load_package(args.packages, package) for name, package in {**BASE, **JUDGE}.items()
    }
    drawings = rows(packages)
    pq.write_table(pa.Table.from_pylist(drawings), args.output, compression="none")
    print(f"{len(drawings)} drawings, {args.output.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
