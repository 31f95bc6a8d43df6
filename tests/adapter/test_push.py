"""The hub gets what is meant to leave, and nothing else."""

import os

import pytest

from nibble.adapter.push import check_repository, files_to_push, push
from nibble.errors import UnavailableError, UsageError

KEPT = ("README.md", "adapter.gguf", "adapter_config.json", "adapter_model.safetensors",
        "chat_template.jinja", "tokenizer.json")  # fmt: skip
LEFT = ("training_args.bin", "optimizer.pt", "state.pkl", "events.jsonl", "run.yaml", ".env",
        "adapter_model.bin", "metrics.csv", "notes.txt")  # fmt: skip


class FakeHub:
    """Takes what a client of the hub would send."""

    def __init__(self):
        self.repositories, self.commits = {}, []

    def create_repo(self, name, *, private, exist_ok):
        self.repositories.setdefault(name, private)
        return f"https://hub.example/{name}"

    def create_commit(self, name, operations, *, commit_message):
        assert name in self.repositories
        self.commits.append({o.path_in_repo: o.upload_info.size for o in operations})


@pytest.fixture
def folder(tmp_path):
    for name in (*KEPT, *LEFT):
        (tmp_path / name).write_text(name)
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "state.safetensors").write_text("x")
    os.symlink("/etc/hostname", tmp_path / "config.json")
    return tmp_path


def test_only_allowed_files(folder):
    assert [path.name for path in files_to_push(folder)] == sorted(KEPT)


def test_private_unless_asked_otherwise(folder):
    hub = FakeHub()
    address = push(files_to_push(folder), "me/one", is_public=False, api=hub)
    push(files_to_push(folder), "me/two", is_public=True, api=hub)
    assert address == "https://hub.example/me/one"
    assert hub.repositories == {"me/one": True, "me/two": False}
    assert hub.commits[0] == {name: len(name) for name in KEPT}


def test_offline(folder):
    with pytest.raises(UnavailableError, match="cannot be reached") as error:
        push(files_to_push(folder), "me/one", is_public=False)
    assert error.value.exit_code == 69


@pytest.mark.parametrize("name", ["adapter", "a/b/c", "me/", "me/ad apter", "https://x/y"])
def test_names(name):
    with pytest.raises(UsageError, match="owner/name"):
        check_repository(name)
    check_repository("me/adapter-1.0")
