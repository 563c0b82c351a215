"""Published weights of a reward: found by path, URL or hub name, read without unpickling code."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

SUFFIXES = (".safetensors", ".pt", ".pth", ".bin")

_LOADING = {"output_loading_info": True, "dtype": torch.float32}


def split(weights: str | None, published: str, parts: str) -> tuple[str, str]:
    """(weights, where the other parts are) of `WEIGHTS` or `WEIGHTS+PARTS`.

    Other parts are a tokenizer and the like: by default of the WEIGHTS if they are a directory with
    a tokenizer, else the published ones.
    """
    if weights is None:
        return published, parts
    if not Path(weights).exists():
        head, plus, tail = weights.rpartition("+")
        # the aesthetic predictor's own file name has + in it
        if plus and not tail.endswith(SUFFIXES):
            return head, tail
    return weights, weights if (Path(weights) / "tokenizer_config.json").is_file() else parts


@contextlib.contextmanager
def expecting(
    what: str,
    where: str,
    argument: str = "rewards",
    hint: str = "; name local weights by NAME=PATH",
) -> Iterator[None]:
    """Turns what the libraries raise for files that are missing or others into one line that names
    the argument; a line that does so already stays."""
    try:
        yield
    except ImportError:
        raise
    except Exception as error:  # a missing file, key or network, a pickle, a wrong shape, …
        if str(error).startswith(f"{argument}: "):
            raise
        reason = " ".join(str(error).split())[:300]
        raise ValueError(
            f"{argument}: expected {what} at {where!r}, a local path or a hub name that can be "
            f"fetched, got {type(error).__name__}: {reason}{hint}"
        ) from error


def find_file(where: str) -> Path | None:
    """The single file that `where` names: a path, a URL or a hub's `OWNER/NAME/FILE`; None: it names
    a directory, local or on the hub."""
    if Path(where).exists():
        return Path(where) if Path(where).is_file() else None
    if where.startswith("https://"):
        path = Path(torch.hub.get_dir()) / "checkpoints" / where.rpartition("/")[2]
        if not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(where, str(path), progress=False)
        return path
    if file := re.fullmatch(r"([\w.-]+/[\w.-]+)/([^:]+)", where):
        from huggingface_hub import hf_hub_download

        return Path(hf_hub_download(*file.groups()))
    if where.endswith(SUFFIXES) or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", where):
        raise FileNotFoundError(f"there is no {where!r}")
    return None


def read(path: Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors file, or of one by torch.save that holds nothing but data.

    Raises:
        ValueError: it cannot be read; the message says where it is, as a download may be torn.
    """
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
        state = state.get("state_dict", state)
    except Exception as error:  # a pickle, a torn or missing file, no dictionary, …
        raise ValueError(f"{str(path)!r}, which cannot be read ({error})") from error
    return {name.removeprefix("module."): value for name, value in state.items()}


def tokenizer_hash(tokenizer: Any) -> str:
    """SHA-256 of a transformers tokenizer's vocabulary and of the length that it cuts prompts to."""
    known = [sorted(tokenizer.get_vocab().items()), tokenizer.model_max_length]
    return hashlib.sha256(json.dumps(known).encode()).hexdigest()


def pretrained(
    kind: type,
    where: str,
    config: dict | None = None,
    convert: Callable[[dict[str, Tensor]], dict[str, Tensor]] | None = None,
) -> nn.Module:
    """A transformers model in float32 with all its weights.

    Args:
        kind: its class.
        where: a directory or hub name as transformers saves it, or a single file (see `find_file`).
        config: of the published architecture, which a single file does not tell.
        convert: from a single file's names to transformers'.
    Raises:
        ValueError: not found, or not every weight of the architecture.
    """
    with expecting(f"weights of a {kind.__name__}", where):
        file = find_file(where)
        if file is None:
            model, info = kind.from_pretrained(where, **_LOADING)
            _check_whole(info)
            return model
        state = read(file)
        return from_state(kind, config or {}, convert(state) if convert else state)


def from_state(kind: type, config: dict, state: dict[str, Tensor], **options: Any) -> nn.Module:
    """A transformers model in float32 of these weights; without a random one before. Raises
    ValueError if one is missing."""
    config = kind.config_class(**config)
    model, info = kind.from_pretrained(None, config=config, state_dict=state, **_LOADING, **options)
    _check_whole(info)
    return model


def _check_whole(info: dict[str, Any]) -> None:
    for problem in ("missing_keys", "mismatched_keys"):
        if names := sorted(map(str, info[problem])):
            raise ValueError(f"{problem.replace('_', ' ')}: {len(names)}, the first {names[0]}")
