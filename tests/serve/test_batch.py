"""Many answers at once: each is what it is alone, and what transformers makes of it."""

from dataclasses import replace

import pytest
import torch

from nibble.adapter.format import write_adapter
from nibble.adapter.many import Adapters
from nibble.errors import UsageError
from nibble.model.adapt import adapt
from nibble.model.load import load_base
from nibble.serve.batch import Batch
from nibble.serve.sampling import Sampling

FAMILIES = (
    *("llama", "mistral", "falcon-7b", "falcon-40b", "qwen2", "qwen3", "gemma", "gemma2"),
    *("gemma3", "phi3", "mixtral", "qwen3_moe"),
)
PROMPTS = ("hello there", "a", "The window is shorter than this prompt", "12345", "Straße €")


def run(batch):
    """Tokens and text of every answer, in the order of their first piece."""
    found = {}
    while batch.has_work():
        for piece in batch.step():
            tokens, texts = found.setdefault(piece.sequence, ([], []))
            texts.append(piece.text)
            if piece.token is not None:
                tokens.append(piece.token)
    return {answer: (tokens, "".join(texts)) for answer, (tokens, texts) in found.items()}


def answers_to(model, tokenizer, requests, adapters=None, **room):
    """Tokens and text of each (ids, sampling, adapter), made together."""
    batch = Batch(model, tokenizer, adapters, **{"max_tokens": 100_000, **room})
    added = [batch.add(ids, sampling, adapter=name) for ids, sampling, name in requests]
    found = run(batch)
    return [found[answer] for answer in added]


def expected_tokens(reference, ids, count, stops):
    output = reference.generate(
        torch.tensor([ids]), max_new_tokens=count, do_sample=False, eos_token_id=sorted(stops)
    )
    tokens = output[0, len(ids) :].tolist()
    return tokens[:-1] if tokens[-1] in stops else tokens


@pytest.fixture(scope="module")
def tiny(tiny_model_folder):
    return load_base(str(tiny_model_folder("llama")), "float32")


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_answers_of_a_batch_are_those_of_transformers(tiny_model_folder, family):
    from transformers import AutoModelForCausalLM

    from nibble.serve.stops import stop_ids

    folder = tiny_model_folder(family)
    model, tokenizer = load_base(str(folder), "float32")
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    stops = stop_ids(model, tokenizer)
    prompts = [tokenizer(text).input_ids for text in PROMPTS]
    requests = [(ids, Sampling(max_new_tokens=9), None) for ids in prompts]
    found = answers_to(model, tokenizer, requests)
    for ids, (tokens, text) in zip(prompts, found, strict=True):
        assert tokens == expected_tokens(reference, ids, 9, stops)
        assert text == tokenizer.decode(tokens, skip_special_tokens=True)


@pytest.fixture(scope="module")
def folders(tiny_model_folder, tmp_path_factory):
    """Adapter folders with updates that change the answers."""

    def of(family, names=("a", "b")):
        made = {}
        for seed, name in enumerate(names):
            model, _ = load_base(str(tiny_model_folder(family)), "float32")
            adapt(model, rank=4, alpha=8, generator=torch.Generator().manual_seed(seed))
            with torch.no_grad():
                for key, factor in model.named_parameters():
                    if key.endswith("lora_B"):
                        factor.normal_(0, 0.2, generator=torch.Generator().manual_seed(seed))
            made[name] = tmp_path_factory.mktemp(f"{family}-{name}")
            write_adapter(model, made[name])
        return made

    return of


@pytest.mark.parametrize("storage", ["float32", "bf16", "nf4"])
@pytest.mark.parametrize("family", ["llama", "mixtral", "gemma2"])
def test_answers_do_not_depend_on_the_batch(tiny_model_folder, folders, family, storage):
    model, tokenizer = load_base(str(tiny_model_folder(family)), storage)
    adapters = Adapters(model)
    for name, folder in folders(family).items():
        adapters.load(name, folder)
    drawn = Sampling(max_new_tokens=8, temperature=1.0, top_k=50, top_p=0.9)
    requests = [
        (tokenizer(text).input_ids, replace(drawn, seed=seed, temperature=seed % 2), name)
        for seed, text in enumerate(PROMPTS)
        for name in (None, "b", "a")
    ]
    together = answers_to(model, tokenizer, requests, adapters)
    alone = [answers_to(model, tokenizer, [each], adapters)[0] for each in requests]
    assert together == alone
    assert len({tuple(tokens) for tokens, _ in together}) > len(PROMPTS)
    waiting = answers_to(model, tokenizer, requests, adapters, max_sequences=2)
    assert waiting == alone


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_an_adapter_in_a_batch_is_the_adapter_alone_on_the_base(tiny_model_folder, folders, family):
    from nibble.adapter.format import read_adapter
    from nibble.serve.generate import generate

    made = folders(family)
    model, tokenizer = load_base(str(tiny_model_folder(family)), "float32")
    adapters = Adapters(model)
    for name, folder in made.items():
        adapters.load(name, folder)
    ids, sampling = tokenizer("hello there").input_ids, Sampling(max_new_tokens=12)
    found = answers_to(model, tokenizer, [(ids, sampling, n) for n in (*made, None)], adapters)
    for (name, folder), (_, text) in zip(made.items(), found[:-1], strict=True):
        alone, _ = load_base(str(tiny_model_folder(family)), "float32")
        read_adapter(alone, folder)
        assert generate(alone, tokenizer, "hello there", max_new_tokens=12) == text
        with adapters.chosen(name):
            assert generate(model, tokenizer, "hello there", max_new_tokens=12) == text
    assert generate(model, tokenizer, "hello there", max_new_tokens=12) == found[-1][1]


def test_answers_wait_for_room_in_order(tiny):
    model, tokenizer = tiny
    batch = Batch(model, tokenizer, max_tokens=30)
    long = batch.add([5] * 10, Sampling(max_new_tokens=12))
    large = batch.add([5] * 20, Sampling(max_new_tokens=2))
    small = batch.add([5], Sampling(max_new_tokens=1))
    assert {piece.sequence for piece in batch.step()} == {long}
    assert {piece.sequence for piece in batch.step()} == {long}
    batch.drop(long)
    assert [piece.sequence for piece in batch.step()] == [large, small]
    batch.drop(large)
    assert not batch.has_work()
    assert batch.step() == []


def test_uses_tells_of_waiting_and_running_answers(tiny_model_folder, folders):
    model, tokenizer = load_base(str(tiny_model_folder("llama")), "float32")
    adapters = Adapters(model)
    adapters.load("a", folders("llama")["a"])
    batch = Batch(model, tokenizer, adapters, max_tokens=100)
    batch.add([5, 6], Sampling(max_new_tokens=2), adapter="a")
    assert batch.uses("a")
    batch.step()
    assert batch.uses("a")
    batch.step()
    assert not batch.uses("a")


@pytest.mark.parametrize(
    ("ids", "sampling", "adapter", "said"),
    [
        ([], Sampling(), None, "empty"),
        ([5], Sampling(), "law", "law"),
        ([5] * 250, Sampling(max_new_tokens=7), None, "256"),
        ([5] * 90, Sampling(max_new_tokens=11), None, "100"),
    ],
)
def test_what_cannot_run_is_refused(tiny, ids, sampling, adapter, said):
    model, tokenizer = tiny
    batch = Batch(model, tokenizer, max_tokens=300 if len(ids) > 200 else 100)
    with pytest.raises(UsageError, match=said):
        batch.add(ids, sampling, adapter=adapter)
    assert not batch.has_work()


def test_log_probabilities_are_those_of_the_logits(tiny, tiny_model_folder):
    from transformers import AutoModelForCausalLM

    model, tokenizer = tiny
    reference = AutoModelForCausalLM.from_pretrained(
        tiny_model_folder("llama"), dtype=torch.float32
    )
    ids = tokenizer("hello there").input_ids
    batch = Batch(model, tokenizer, max_tokens=100)
    sampling = Sampling(max_new_tokens=3, num_logprobs=2, of_prompt=True)
    answer = batch.add(ids, sampling)
    pieces = []
    while batch.has_work():
        pieces += batch.step()
    tokens = [*ids, *(piece.token for piece in pieces)]
    with torch.no_grad():
        expected = reference(torch.tensor([tokens])).logits[0].log_softmax(-1)
    assert answer.prompt_logprobs[0] is None
    found = [*answer.prompt_logprobs[1:], *(piece.logprob for piece in pieces)]
    assert len(found) == len(tokens) - 1
    for place, logprob in enumerate(found):
        assert logprob.token == tokens[place + 1]
        assert logprob.text == tokenizer.decode([logprob.token])
        assert logprob.logprob == pytest.approx(float(expected[place, logprob.token]), abs=1e-4)
        top = expected[place].topk(2)
        assert [each[0] for each in logprob.top] == top.indices.tolist()
        assert [each[2] for each in logprob.top] == pytest.approx(top.values.tolist(), abs=1e-4)
    assert answer.num_prompt_tokens == len(ids)
    assert answer.num_new_tokens == 3


def test_no_new_tokens_gives_the_prompt_alone(tiny):
    model, tokenizer = tiny
    batch = Batch(model, tokenizer, max_tokens=100)
    sampling = Sampling(max_new_tokens=0, num_logprobs=0, of_prompt=True)
    answer = batch.add([5, 6, 7], sampling)
    (piece,) = batch.step()
    assert (piece.token, piece.text, piece.finish) == (None, "", "length")
    assert len(answer.prompt_logprobs) == 3
    assert not batch.has_work()


def test_a_stop_text_ends_the_answer(tiny):
    model, tokenizer = tiny
    ids = tokenizer("hello there").input_ids
    ((tokens, text),) = answers_to(model, tokenizer, [(ids, Sampling(max_new_tokens=12), None)])
    stop = text[4:6]
    sampling = Sampling(max_new_tokens=12, stop=(stop, "never said"))
    ((fewer, shorter),) = answers_to(model, tokenizer, [(ids, sampling, None)])
    assert shorter == text[: text.index(stop)]
    assert fewer == tokens[: len(fewer)]
    assert len(fewer) < len(tokens)


def test_the_token_that_ends_an_answer_has_its_logprob(tiny, monkeypatch):
    """A harness that asks for one token leaves the last out, whatever it is."""
    model, tokenizer = tiny
    batch = Batch(model, tokenizer, max_tokens=1000)
    ids = tokenizer("hello")["input_ids"]
    batch.add(ids, Sampling(max_new_tokens=1, num_logprobs=1))
    (piece,) = batch.step()
    monkeypatch.setattr(batch, "_stop_ids", {piece.token})
    batch.add(ids, Sampling(max_new_tokens=1, num_logprobs=1))
    (end,) = batch.step()
    assert (end.token, end.finish, end.logprob) == (None, "stop", piece.logprob)
