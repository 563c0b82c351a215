"""Files of pairs, and what a source makes of them, in short."""

import hashlib

import tiny

from dde_fast.pairs import Pair


def sha(seed: int) -> str:
    return "sha256:" + hashlib.sha256(tiny.png(seed)).hexdigest()


def put(path, content: bytes | str):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def images(folder, count: int = 4):
    """Files 0.png, 1.png, … of the pictures of these seeds."""
    for i in range(count):
        put(folder / f"{i}.png", tiny.png(i))
    return folder


def outcome(source) -> list[tuple[int, str]]:
    """(pair id, "winner > loser" by seed, or the reason) of each row, the bytes compared."""
    names = {sha(i): str(i) for i in range(50)}
    found = []
    for row in source.rows():
        if isinstance(row, Pair):
            for image in (row.winner, row.loser):
                (data,) = source.read([image.place])
                assert image.key == "sha256:" + hashlib.sha256(data).hexdigest()
            found.append((row.pair_id, f"{names[row.winner.key]} > {names[row.loser.key]}"))
        else:
            found.append((row.pair_id, row.reason))
    return found
