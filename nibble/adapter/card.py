"""README.md of what leaves: the front matter that model hubs read, and a text."""

import json


def model_card(base: str, *, body: str = "", is_merged: bool = False) -> str:
    """README.md of an adapter, or of a base that an adapter was merged into."""
    library, relation = ("transformers", "finetune") if is_merged else ("peft", "adapter")
    lines = ["---", f"library_name: {library}", f"base_model: {json.dumps(base)}"]
    lines += [f"base_model_relation: {relation}", "pipeline_tag: text-generation"]
    lines += ["tags:", "- lora", "- nibble", "---", ""]
    return "\n".join([*lines, body or "A LoRA adapter trained with nibble.", ""])
