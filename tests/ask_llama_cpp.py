"""llama.cpp, by its binding xllamacpp, asked as any client asks its server. Run as a script, in a process of its own.

Reads {"file", "prompts", "messages", "texts", "max_tokens"} as JSON from its standard input and prints {"made": ids
behind each prompt, "chats": of each message [its prompt's tokens, the reply], "prompts": ids that a message becomes,
"texts": ids of each text}.
"""

import json
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.request import Request, urlopen

AT_ONCE = 8


def main() -> None:
    import xllamacpp

    asked = json.load(sys.stdin)
    settings = xllamacpp.CommonParams()
    settings.model.path = asked["file"]
    settings.n_parallel, settings.n_ctx, settings.warmup = AT_ONCE, AT_ONCE * 512, False
    settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = 1
    settings.verbosity = 0
    server = xllamacpp.Server(settings)

    def post(path: str, body: dict[str, Any]) -> Any:
        request = Request(
            server.listening_address + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urlopen(request, timeout=900) as reply:
            return json.load(reply)

    def complete(prompt: list[int]) -> Any:
        greedy = {"n_predict": asked["max_tokens"], "temperature": 0, "return_tokens": True, "cache_prompt": False}
        return post("/completion", {"prompt": prompt, **greedy})["tokens"]

    def chat(message: str) -> Any:
        body = {"messages": [{"role": "user", "content": message}], "max_tokens": asked["max_tokens"], "temperature": 0}
        reply = post("/v1/chat/completions", body)
        return reply["usage"]["prompt_tokens"], reply["choices"][0]["message"]["content"]

    def read(message: str) -> Any:
        prompt = post("/apply-template", {"messages": [{"role": "user", "content": message}]})["prompt"]
        return post("/tokenize", {"content": prompt, "add_special": True, "parse_special": True})["tokens"]

    with ThreadPoolExecutor(AT_ONCE) as pool:
        made = list(pool.map(complete, asked["prompts"]))
        chats = list(pool.map(chat, asked["messages"]))
    texts = [post("/tokenize", {"content": text, "add_special": False})["tokens"] for text in asked["texts"]]
    prompts = [read(message) for message in asked["messages"]]
    print(json.dumps({"made": made, "chats": chats, "texts": texts, "prompts": prompts}), flush=True)
    os._exit(0)  # the server's threads would wait for more


if __name__ == "__main__":
    main()
