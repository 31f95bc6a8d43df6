"""`nibble serve` in a process of its own, and the OpenAI client as it is published."""

import os
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest

from nibble.adapter.format import write_adapter
from nibble.model.adapt import adapt
from nibble.model.load import load_base

HELLO = [{"role": "user", "content": "Say hello."}]


class Served:
    """A server and what it printed."""

    def __init__(self, *words, env=None):
        command = [sys.executable, "-m", "nibble", "serve", "--port", "0", *map(str, words)]
        self.process = subprocess.Popen(
            command,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, **(env or {})},
            # Tests that run in the background of a shell ignore it, and so would the server.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )
        self.said = {}
        while "try" not in self.said:
            line = self.process.stderr.readline()
            assert line, self.said
            name, _, value = line.strip().partition(" ")
            self.said[name] = value.strip()

    def client(self, **options):
        options = {"api_key": self.said["token"], "max_retries": 0, "timeout": 60} | options
        return openai.OpenAI(base_url=self.said["address"], **options)

    def end(self, number=signal.SIGTERM):
        """Exit code and seconds after a signal."""
        begun = time.monotonic()
        self.process.send_signal(number)
        code = self.process.wait(20)
        return code, time.monotonic() - begun

    def close(self):
        self.process.kill()
        self.process.wait()
        self.process.stderr.close()


@pytest.fixture(scope="module")
def folders(shared, tmp_path_factory):
    """The base and two adapters that change its answers."""
    import torch

    model, made = shared / "models" / "base-16m", tmp_path_factory.mktemp("adapters")
    for number, name in enumerate(("one", "two")):
        base, tokenizer = load_base(str(model), "bf16")
        adapt(base, rank=4, alpha=64)
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(number)
            for parameter_name, parameter in base.named_parameters():
                if parameter_name.endswith("lora_B"):
                    parameter.copy_(0.02 * torch.randn_like(parameter))
        write_adapter(base, made / name, tokenizer=tokenizer)
    return model, made


@pytest.fixture(scope="module")
def served(folders):
    """The base and one adapter, the other to be loaded."""
    model, made = folders
    served = Served("--model", model, "--adapter", f"one={made / 'one'}", "--adapters-from", made)
    yield served
    try:
        assert served.process.poll() is None
        code, seconds = served.end()
        assert (code, seconds < 10) == (0, True)
    finally:
        served.close()


@pytest.fixture(scope="module")
def client(served):
    with served.client() as client:
        yield client


def _text(client, model="base-16m", **more):
    more = {"max_tokens": 12, "temperature": 0} | more
    answer = client.chat.completions.create(model=model, messages=HELLO, **more)
    return answer.choices[0].message.content


def test_list_and_retrieve(client):
    assert [model.id for model in client.models.list()] == ["base-16m", "one"]
    assert client.models.retrieve("one").owned_by == "nibble"


def test_chat_and_its_stream_are_the_same_text(client):
    whole = client.chat.completions.create(
        model="base-16m", messages=HELLO, max_completion_tokens=20, temperature=0
    )
    assert whole.choices[0].finish_reason in ("stop", "length")
    assert whole.usage.completion_tokens <= 20
    chunks = list(
        client.chat.completions.create(
            model="base-16m",
            messages=HELLO,
            max_completion_tokens=20,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    text = "".join(each.choices[0].delta.content or "" for each in chunks if each.choices)
    assert text == whole.choices[0].message.content
    assert chunks[-1].usage == whole.usage


def test_a_chat_is_that_of_generate(client, folders):
    from nibble.serve.generate import generate

    base, tokenizer = load_base(str(folders[0]), "bf16")
    assert _text(client) == generate(base, tokenizer, HELLO, max_new_tokens=12, temperature=0.0)


def test_seeds_repeat_and_stops_end(client):
    drawn = [_text(client, temperature=1, seed=seed) for seed in (1, 1, 2, 3)]
    assert drawn[0] == drawn[1]
    assert len(set(drawn)) > 1
    whole = _text(client)
    assert _text(client, stop=[whole[4]]) == whole[: whole.index(whole[4])]


def test_logprobs(client):
    answer = client.chat.completions.create(
        model="one", messages=HELLO, max_tokens=5, temperature=0, logprobs=True, top_logprobs=3
    )
    content = answer.choices[0].logprobs.content
    assert "".join(each.token for each in content) == answer.choices[0].message.content
    for each in content:
        assert len(each.top_logprobs) == 3
        assert each.logprob == each.top_logprobs[0].logprob <= 0
        assert bytes(each.bytes).decode() == each.token


def test_completions_with_echo_and_logprobs(client):
    answer = client.completions.create(
        model="base-16m",
        prompt=["Hello there, friend", "One"],
        max_tokens=4,
        echo=True,
        logprobs=2,
        temperature=0,
    )
    for choice, prompt in zip(answer.choices, ("Hello there, friend", "One"), strict=True):
        assert choice.text.startswith(prompt)
        logprobs = choice.logprobs
        assert logprobs.token_logprobs[0] is None
        assert all(value <= 0 for value in logprobs.token_logprobs[1:])
        for token, offset in zip(logprobs.tokens, logprobs.text_offset, strict=True):
            assert choice.text[offset:].startswith(token)


def test_scores_of_a_prompt_are_those_of_the_model(client, folders):
    """As a harness asks: token ids, no answer."""
    import torch

    base, tokenizer = load_base(str(folders[0]), "bf16")
    ids = tokenizer("The quick brown fox jumps").input_ids
    answer = client.completions.create(
        model="base-16m", prompt=[ids], max_tokens=0, echo=True, logprobs=1
    )
    found = answer.choices[0].logprobs.token_logprobs[1:]
    with torch.no_grad():
        logits = base(torch.tensor([ids])).logits[0, :-1].float().log_softmax(-1)
    expected = logits.gather(1, torch.tensor(ids[1:]).unsqueeze(1)).flatten().tolist()
    assert found == pytest.approx(expected, abs=0.1)


def test_requests_for_different_adapters_at_once(client, folders):
    client.post(
        "/load_lora_adapter",
        body={"lora_name": "two", "lora_path": str(folders[1] / "two")},
        cast_to=str,
    )
    names = ["base-16m", "one", "two"]
    alone = {name: _text(client, name) for name in names}
    assert len(set(alone.values())) == 3
    with ThreadPoolExecutor(12) as pool:
        together = list(pool.map(lambda name: (name, _text(client, name)), names * 4))
    assert all(text == alone[name] for name, text in together)
    client.post("/unload_lora_adapter", body={"lora_name": "two"}, cast_to=str)
    with pytest.raises(openai.NotFoundError):
        _text(client, "two")


def test_errors_are_those_of_the_client(client, served):
    cases = {
        openai.NotFoundError: {"model": "bse-16m"},
        openai.BadRequestError: {"temperature": 5},
    }
    for kind, more in cases.items():
        with pytest.raises(kind) as found:
            client.chat.completions.create(**{"model": "one", "messages": HELLO} | more)
        assert found.value.body["message"]
    with pytest.raises(openai.BadRequestError) as found:
        client.completions.create(model="one", prompt="word " * 3000)
    assert found.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError) as found:
        client.chat.completions.create(model="one", messages=HELLO, extra_body={"tempratur": 1})
    assert 'did you mean "temperature"' in str(found.value)
    with pytest.raises(openai.AuthenticationError), served.client(api_key="wrong") as stranger:
        stranger.models.list()
    with pytest.raises(openai.APIStatusError) as found:
        client.completions.create(model="one", prompt="x" * 1_100_000)
    assert found.value.status_code == 413


def test_the_line_to_try_works(served):
    words = re.findall(r"'[^']*'|\"[^\"]*\"|\S+", served.said["try"])
    words = [word[1:-1] if word[0] in "'\"" else word for word in words]
    done = subprocess.run([*words, "-s"], capture_output=True, text=True, check=True)
    assert '"object":"chat.completion"' in done.stdout


def test_a_running_answer_is_finished_or_ended_in_time(folders):
    """Ctrl-C while a stream runs: it ends within ten seconds, with the code of an interrupt."""
    served = Served("--model", folders[0], env={"NIBBLE_TOKEN": "given"})
    try:
        assert served.said["token"] == "as given"
        with served.client(api_key="given") as client:
            stream = client.completions.create(
                model="base-16m", prompt="One", max_tokens=900, temperature=0, stream=True
            )
            next(iter(stream))
            code, seconds = served.end(signal.SIGINT)
            assert (code, seconds < 10) == (130, True)
            with pytest.raises(openai.APIConnectionError):
                client.models.list()
    finally:
        served.close()


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["--token", "none", "--host", "0.0.0.0"], 2, "let anybody in"),
        (["--adapter", "x"], 2, "name=FOLDER"),
        (["--adapter", "a'b=x"], 2, "is no name"),
        (["--adapter", "base-16m=x"], 2, "is taken"),
        (["--adapter", "x=/"], 65, "holds no adapter_config.json"),
        (["--method", "full"], 2, "lora or qlora"),
    ],
)
def test_wrong_command_lines(shared, words, code, message):
    command = [sys.executable, "-m", "nibble", "serve", "--port", "0"]
    model = ["--model", str(shared / "models" / "base-16m")]
    done = subprocess.run([*command, *model, *words], capture_output=True, text=True)
    assert (done.returncode, message in done.stderr) == (code, True), done.stderr


def test_a_port_in_use_is_told_before_the_model_is_loaded(served):
    port = re.search(r":(\d+)/", served.said["address"]).group(1)
    command = [sys.executable, "-m", "nibble", "serve", "--model", "/none", "--port", port]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, "cannot listen" in done.stderr) == (69, True)
