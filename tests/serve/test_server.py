"""Routes and shapes, as OpenAI's clients read them; the engine is made up."""

import json

import pytest

from nibble.serve.limits import Limits

from .fake import ByteTokenizer, fake_service

CHAT = {"model": "base", "messages": [{"role": "user", "content": "hi"}]}
PROMPT = "<user>hi\n<assistant>"
TEXT = {"model": "base", "prompt": "abcdef"}


def chat(client, **more):
    return client.post("/v1/chat/completions", json=CHAT | more)


def complete(client, **more):
    return client.post("/v1/completions", json=TEXT | more)


def events(response):
    """The documents of a stream, and whether it ended in order."""
    blocks = response.text.split("\n\n")
    assert all(block.startswith("data: ") for block in blocks[:-1])
    assert blocks[-1] == ""
    data = [block.removeprefix("data: ") for block in blocks[:-1]]
    is_done = data[-1] == "[DONE]"
    return [json.loads(each) for each in data[: len(data) - is_done]], is_done


def test_health_models_and_one_model(client):
    assert client.get("/health").json() == {"status": "ok"}
    listed = client.get("/v1/models").json()
    assert listed["object"] == "list"
    assert [each["id"] for each in listed["data"]] == ["base", "law", "med"]
    assert client.get("/v1/models/law").json()["parent"] == "base"
    missing = client.get("/v1/models/lw")
    assert missing.status_code == 404
    assert missing.json()["error"]["code"] == "model_not_found"
    assert 'did you mean "law"' in missing.json()["error"]["message"]


def test_chat(client):
    answer = chat(client).json()
    assert answer["object"] == "chat.completion"
    assert answer["model"] == "base"
    assert answer["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": PROMPT, "refusal": None},
            "logprobs": None,
            "finish_reason": "stop",
        }
    ]
    size = len(PROMPT)
    assert answer["usage"] == {
        "prompt_tokens": size,
        "completion_tokens": size,
        "total_tokens": 2 * size,
    }
    assert chat(client, model="law").json()["choices"][0]["message"]["content"] == PROMPT.upper()


def test_chat_ends_at_its_length_and_at_a_stop_text(client):
    for name in ("max_tokens", "max_completion_tokens"):
        choice = chat(client, **{name: 4}).json()["choices"][0]
        assert (choice["message"]["content"], choice["finish_reason"]) == ("<use", "length")
    for stop in ("r", ["x", "r"]):
        choice = chat(client, stop=stop).json()["choices"][0]
        assert (choice["message"]["content"], choice["finish_reason"]) == ("<use", "stop")


def test_logprobs_of_a_chat(client):
    choice = chat(client, max_tokens=2, logprobs=True, top_logprobs=2).json()["choices"][0]
    assert choice["logprobs"]["content"] == [
        {
            "token": letter,
            "logprob": -0.5,
            "bytes": [ord(letter)],
            "top_logprobs": [
                {"token": letter, "logprob": -0.5, "bytes": [ord(letter)]},
                {"token": "A", "logprob": -1.5, "bytes": [65]},
            ],
        }
        for letter in "<u"
    ]


def test_an_impossible_token_has_the_lowest_logprob(client):
    choice = chat(client, max_tokens=1, logprobs=True, top_logprobs=3).json()["choices"][0]
    assert choice["logprobs"]["content"][0]["top_logprobs"][2]["logprob"] == -9999.0


def test_stream_of_a_chat(client):
    response = chat(client, max_tokens=3, stream=True, stream_options={"include_usage": True})
    assert response.headers["content-type"].startswith("text/event-stream")
    found, is_done = events(response)
    assert is_done
    assert len({each["id"] for each in found}) == 1
    assert {each["object"] for each in found} == {"chat.completion.chunk"}
    deltas = [each["choices"][0]["delta"] for each in found[:-1]]
    assert deltas[0] == {"role": "assistant", "content": ""}
    assert "".join(delta["content"] for delta in deltas) == "<us"
    finishes = [each["choices"][0]["finish_reason"] for each in found[:-1]]
    assert finishes == [None, None, None, "length"]
    assert found[-1]["choices"] == []
    assert found[-1]["usage"]["completion_tokens"] == 3
    assert all(each["usage"] is None for each in found[:-1])


def test_a_stream_without_usage_says_nothing_of_it(client):
    found, _ = events(chat(client, max_tokens=1, stream=True))
    assert all("usage" not in each for each in found)


def test_several_answers_to_one_chat(client):
    answer = chat(client, n=3, max_tokens=2).json()
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2]
    assert answer["usage"] == {
        "prompt_tokens": len(PROMPT),
        "completion_tokens": 6,
        "total_tokens": len(PROMPT) + 6,
    }
    found, _ = events(chat(client, n=2, max_tokens=2, stream=True))
    texts = {0: "", 1: ""}
    for each in found:
        choice = each["choices"][0]
        texts[choice["index"]] += choice["delta"].get("content", "")
    assert texts == {0: "<u", 1: "<u"}


@pytest.mark.parametrize(
    ("prompt", "texts"),
    [
        ("abc", ["abc"]),
        (["abc", "de"], ["abc", "de"]),
        ([97, 98], ["ab"]),
        ([[97, 98], [99]], ["ab", "c"]),
    ],
)
def test_completions_of_every_form_of_prompt(client, prompt, texts):
    answer = complete(client, prompt=prompt).json()
    assert answer["object"] == "text_completion"
    assert [choice["text"] for choice in answer["choices"]] == texts
    assert [choice["index"] for choice in answer["choices"]] == list(range(len(texts)))
    echoed = complete(client, prompt=prompt, echo=True).json()
    assert [choice["text"] for choice in echoed["choices"]] == [2 * text for text in texts]


def test_a_completion_without_a_number_is_short(client):
    answer = complete(client, prompt="a" * 40).json()
    assert answer["choices"][0]["text"] == "a" * 16


def test_logprobs_of_a_completion_and_their_places(client):
    choice = complete(client, max_tokens=2, logprobs=1).json()["choices"][0]
    assert choice["logprobs"] == {
        "tokens": ["a", "b"],
        "token_logprobs": [-0.5, -0.5],
        "top_logprobs": [{"a": -0.5}, {"b": -0.5}],
        "text_offset": [0, 1],
    }


def test_logprobs_of_a_prompt_alone(client):
    """What a harness asks for that scores texts."""
    choice = complete(client, prompt=[97, 98, 99], max_tokens=0, echo=True, logprobs=1)
    choice = choice.json()["choices"][0]
    assert choice["text"] == "abc"
    assert choice["finish_reason"] == "length"
    assert choice["logprobs"] == {
        "tokens": ["a", "b", "c"],
        "token_logprobs": [None, -0.5, -0.5],
        "top_logprobs": [None, {"b": -0.5}, {"c": -0.5}],
        "text_offset": [0, 1, 2],
    }


def test_the_token_that_ends_a_completion_is_scored(client):
    """Of a prompt and one new token a harness leaves the last out, whatever it is."""
    choice = complete(client, prompt="ab", max_tokens=3, echo=True, logprobs=1)
    logprobs = choice.json()["choices"][0]["logprobs"]
    assert logprobs["tokens"] == ["a", "b", "a", "b", "\0"]
    assert logprobs["text_offset"] == [0, 1, 2, 3, 4]


def test_stream_of_a_completion_with_its_prompt(client):
    found, is_done = events(complete(client, max_tokens=2, echo=True, logprobs=0, stream=True))
    assert is_done
    choices = [each["choices"][0] for each in found]
    assert [choice["text"] for choice in choices] == ["abcdefa", "b"]
    assert choices[0]["logprobs"]["text_offset"] == [0, 1, 2, 3, 4, 5, 6]
    assert choices[1]["logprobs"]["text_offset"] == [7]


@pytest.mark.parametrize("is_stream", [False, True])
def test_a_failure_of_the_engine_is_told_once_and_the_server_goes_on(client, is_stream, caplog):
    response = complete(client, prompt="crash", stream=is_stream)
    assert [each.levelname for each in caplog.records if "nibble" in each.name] == ["ERROR"]
    if is_stream:
        (found,), is_done = events(response)
        assert not is_done
    else:
        assert response.status_code == 500
        found = response.json()
    assert found["error"]["type"] == "server_error"
    assert complete(client).status_code == 200
    assert client.service.worker.num_held == 0


def test_beyond_the_queue_a_request_is_refused(client_of):
    limits = Limits(running=1, waiting=1)
    with client_of(fake_service(limits=limits)) as client:
        held = client.service.worker.reserve(2)
        response = complete(client)
        assert response.status_code == 429
        assert response.headers["retry-after"] == "1"
        held.close()
        assert complete(client).status_code == 200
        assert complete(client, n=3).status_code == 400


def test_a_model_without_a_template_takes_completions_alone(client_of):
    tokenizer = ByteTokenizer()
    tokenizer.chat_template = None
    with client_of(fake_service("law", tokenizer=tokenizer)) as client:
        response = chat(client)
        assert response.status_code == 400
        assert "chat template" in response.json()["error"]["message"]
        assert complete(client).status_code == 200
        # An adapter was trained through nibble's own.
        assert "### USER" in chat(client, model="law").json()["choices"][0]["message"]["content"]


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/", 404),
        ("GET", "/v1/nothing", 404),
        ("POST", "/v1/models", 405),
        ("GET", "/v1/chat/completions", 405),
        ("DELETE", "/v1/completions", 405),
        ("PUT", "/health", 405),
    ],
)
def test_wrong_paths_and_methods(client, method, path, status):
    response = client.request(method, path)
    assert response.status_code == status
    assert response.json()["error"]["type"] in ("not_found_error", "invalid_request_error")


@pytest.mark.parametrize(
    ("values", "status", "param"),
    [
        ({"model": "bse"}, 404, "model"),
        ({"prompt": "x" * 600}, 400, "prompt"),
        ({"prompt": "x" * 510, "max_tokens": 10}, 400, "prompt"),
        ({"max_tokens": 5000}, 400, "max_tokens"),
        ({"prompt": ""}, 400, "prompt"),
        ({"prompt": [97, 256]}, 400, "prompt"),
    ],
)
def test_what_the_server_has_not_is_refused(client, values, status, param):
    response = complete(client, **values)
    assert (response.status_code, response.json()["error"]["param"]) == (status, param)
    assert client.service.worker.num_held == 0


def test_messages_that_the_template_does_not_take(client):
    for messages in ([{"role": "robot", "content": "x"}], [{"role": "user"}], [{}]):
        response = chat(client, messages=messages)
        assert response.status_code == 400
        assert response.json()["error"]["param"] == "messages"
