"""Which prompts come, in which order, how often."""

import pytest
import torch

from dde_fast.prompt_stream import Prompts, PromptStream


def test_the_stream_gives_each_group_once_per_step(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("a\n\nb\n c \n")
    prompts = Prompts(str(path), "train")
    assert prompts.names == ["a", "b", "c"] and str(prompts) == f"3 of {path}"
    cpu = torch.device("cpu")
    stream = PromptStream(prompts, [(0, 2), (4, 6)], 2, seed=0, device=cpu)
    batches = [next(stream) for _ in range(4)]
    with pytest.raises(StopIteration):
        next(stream)
    assert [b.step for b in batches] == [0, 1, 0, 1]
    assert batches[0].captions == batches[1].captions != []
    everything = next(PromptStream(prompts, [(0, 6)], 1, seed=0, device=cpu))
    assert everything.captions[:2] == batches[0].captions
    assert everything.captions[4:] == batches[2].captions
    assert everything.epochs.tolist() == [0, 0, 0, 1, 1, 1]
    assert sorted(everything.captions[:3]) == ["a", "b", "c"]
    assert [prompts.names[i] for i in everything.prompt_ids] == everything.captions


def test_the_prompts_of_a_set_are_its_splits():
    held_out = set(Prompts("style", "test").names)
    assert len(held_out) > 20 and not held_out & set(Prompts("style", "train").names)
    assert Prompts("style", "test").fingerprint != Prompts("style", "train").fingerprint
