"""Every first-class family learns with LoRA and QLoRA, and PEFT opens what it learnt."""

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

from nibble.adapter.format import read_adapter, write_adapter
from nibble.data.loader import Batch
from nibble.model.adapt import adapt
from nibble.model.families import head_of, hidden_states
from nibble.model.load import load_base
from nibble.train.loss import token_loss

FAMILIES = (
    "llama", "mistral", "falcon-7b", "falcon-40b", "qwen2", "qwen3", "gemma", "gemma2", "gemma3",
    "phi3", "mixtral", "qwen3_moe",
)  # fmt: skip
LENGTHS = (9, 5, 12)


def batch():
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, 261, (1, sum(LENGTHS)), generator=generator)
    labels = ids.clone()
    ends = torch.tensor([0, *LENGTHS]).cumsum(0).to(torch.int32)
    labels[0, ends[:-1].long()] = -100
    return Batch(
        input_ids=ids,
        labels=labels,
        position_ids=torch.cat([torch.arange(length) for length in LENGTHS])[None],
        cu_seq_lens=ends,
        max_doc_len=max(LENGTHS),
        num_target_tokens=sum(LENGTHS) - len(LENGTHS),
        row_ids=(0,),
    )


def train(model, steps=3):
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(steps + 1):
        loss_sum, count = token_loss(model, batch())
        losses.append(loss_sum.item() / count)
        optimizer.zero_grad()
        (loss_sum / count).backward()
        optimizer.step()
    model.eval()
    return losses


@torch.no_grad()
def logits_of(model):
    return head_of(model).logits(hidden_states(model, batch()))[: LENGTHS[0]]


@pytest.mark.parametrize("storage", ["float32", "bf16", "nf4"])
@pytest.mark.parametrize("family", FAMILIES)
def test_three_steps_and_peft(family, storage, tiny_model_folder, tmp_path):
    folder = tiny_model_folder(family)
    model, tokenizer = load_base(str(folder), storage=storage)
    torch.manual_seed(0)
    adapt(model, rank=4, alpha=8)
    losses = train(model)
    assert all(torch.isfinite(torch.tensor(losses)))
    assert losses == sorted(losses, reverse=True)
    write_adapter(model, tmp_path, tokenizer=tokenizer)

    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(base, tmp_path).eval()
    with torch.no_grad():
        logits = theirs(input_ids=batch().input_ids[:, : LENGTHS[0]]).logits[0]
    ours, _ = load_base(str(folder), storage="float32")
    read_adapter(ours, tmp_path)
    torch.testing.assert_close(logits_of(ours), logits, rtol=1e-5, atol=2e-5)
    if storage == "float32":
        assert torch.equal(logits_of(model), logits_of(ours))
