"""Adapters come and go by name while answers are made."""

import pytest

from nibble.serve.limits import Limits

from .fake import TEMPLATE, fake_service

CHAT = {"model": "new", "messages": [{"role": "user", "content": "hi"}]}


@pytest.fixture
def folders(tmp_path):
    """An allowed folder with two adapters in it, and one beside it."""
    for name in ("allowed/new", "allowed/broken", "other/new"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "allowed" / "link").symlink_to(tmp_path / "other")
    return tmp_path


def load(client, path, name="new"):
    values = {"lora_name": name, "lora_path": str(path)}
    return client.post("/v1/load_lora_adapter", json=values)


def unload(client, name="new"):
    return client.post("/v1/unload_lora_adapter", json={"lora_name": name})


def names(client):
    return [each["id"] for each in client.get("/v1/models").json()["data"]]


def test_an_adapter_comes_and_goes(client_of, folders):
    with client_of(fake_service("law", folders=[folders / "allowed"])) as client:
        assert client.post("/v1/chat/completions", json=CHAT).status_code == 404
        assert load(client, folders / "allowed" / "new").text.startswith("Success")
        assert names(client) == ["base", "law", "new"]
        assert client.post("/v1/chat/completions", json=CHAT).status_code == 200
        assert load(client, folders / "allowed" / "new").status_code == 400
        assert unload(client).text.startswith("Success")
        assert names(client) == ["base", "law"]
        assert client.post("/v1/chat/completions", json=CHAT).status_code == 404
        assert unload(client).status_code == 404
        assert unload(client, "base").status_code == 400
        assert load(client, folders / "allowed" / "new", "base").status_code == 400


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("other/new", 403),
        ("allowed/../other/new", 403),
        ("allowed/link/new", 403),
        ("allowed/none", 400),
        ("allowed/broken", 400),
        ("x" * 4000, 400),
        ("allowed/\0", 400),
    ],
)
def test_only_folders_that_are_allowed_and_fit(client_of, folders, path, status):
    with client_of(fake_service(folders=[folders / "allowed"])) as client:
        assert load(client, f"{folders}/{path}").status_code == status
        assert names(client) == ["base"]


def test_loading_is_off_by_default(client, folders):
    response = load(client, folders / "allowed" / "new")
    assert (response.status_code, response.json()["error"]["code"]) == (403, "loading_off")


def test_the_number_of_adapters_is_bounded(client_of, folders):
    limits = Limits(adapters=1)
    with client_of(fake_service(limits=limits, folders=[folders])) as client:
        assert load(client, folders / "allowed" / "new").status_code == 200
        assert load(client, folders / "allowed" / "new", "second").status_code == 400


def test_a_chat_goes_through_the_template_of_its_adapter(client_of, folders):
    folder = folders / "allowed" / "new"
    (folder / "chat_template.jinja").write_text(TEMPLATE.replace("<assistant>", "[answer]"))
    with client_of(fake_service("law", folders=[folders])) as client:
        load(client, folder)
        for name, end in (("new", "[ANSWER]"), ("law", "<ASSISTANT>")):
            choice = client.post("/v1/chat/completions", json=CHAT | {"model": name}).json()
            assert choice["choices"][0]["message"]["content"].endswith(end)
        unload(client)
        (folder / "chat_template.jinja").unlink()
        load(client, folder)
        choice = client.post("/v1/chat/completions", json=CHAT).json()["choices"][0]
        assert choice["message"]["content"].endswith("<ASSISTANT>")


def test_an_adapter_in_use_goes_once_its_answers_have_ended(client):
    worker = client.service.worker
    order, unload_adapter, step = [], worker.batch.adapters.unload, worker.batch.step

    def watched_step():
        order.append(worker.batch.uses("law"))
        return step()

    def watched_unload(name):
        order.append("unloaded")
        unload_adapter(name)

    worker.batch.step, worker.batch.adapters.unload = watched_step, watched_unload
    values = {"model": "law", "prompt": "x" * 200, "max_tokens": 200, "stream": True}
    with client.stream("POST", "/v1/completions", json=values) as response:
        assert unload(client, "law").status_code == 200
        text = "".join(response.iter_text())
    assert text.count("X") == 200
    assert order == [True] * (len(order) - 1) + ["unloaded"]
    assert names(client) == ["base", "med"]
