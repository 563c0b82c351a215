"""The processes of a run."""

from dde_fast import engine


def test_processes_leave_their_group_before_they_end(monkeypatch):
    """About one in five two-rank runs aborted on exit, gloo's threads still running."""
    kept, groups = [], []
    monkeypatch.setattr(engine.atexit, "register", kept.append)
    monkeypatch.setattr(engine.dist, "is_initialized", lambda: bool(groups))
    monkeypatch.setattr(engine.dist, "init_process_group", lambda kind, **_: groups.append(kind))
    monkeypatch.setattr(engine.dist, "destroy_process_group", groups.clear)
    monkeypatch.setenv("WORLD_SIZE", "2")
    engine.Ranks()
    assert groups == ["gloo"] and len(kept) == 1
    kept[0]()
    assert groups == []
    kept[0]()  # left already
