"""What a user without this package has: a folder, Transformers, and messages. Run as a script, in a process of its own.

Reads {"folder", "base", "messages", "max_new_tokens"} as JSON from its standard input and prints {"prompts", "ids"}.
With a base the folder holds an adapter for it, which PEFT loads as the model card says.
"""

import json
import sys
from typing import Any

sys.modules["memreason"] = None  # type: ignore[assignment]  # whoever imports it fails


def main() -> None:
    asked = json.load(sys.stdin)
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(asked["folder"])
    model: Any = AutoModelForCausalLM.from_pretrained(asked["base"] or asked["folder"], dtype=torch.float32)
    if asked["base"]:
        from peft import PeftModel

        rows = max(len(tokenizer), model.get_input_embeddings().weight.shape[0])
        model.resize_token_embeddings(rows, mean_resizing=False)
        model = PeftModel.from_pretrained(model, asked["folder"]).eval()
    prompts, made = [], []
    for text in asked["messages"]:
        given = tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        ids = model.generate(**given, max_new_tokens=asked["max_new_tokens"], do_sample=False)[0].tolist()
        size = given["input_ids"].shape[1]
        prompts.append(ids[:size])
        made.append(ids[size:])
    print(json.dumps({"prompts": prompts, "ids": made}))


if __name__ == "__main__":
    main()
