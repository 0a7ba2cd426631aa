"""Time greedy batch generation with vLLM's CPU build, as a benchmark baseline.

Prompts come in and completions go out as token ids, so no tokenizer is loaded
and no text is made. The engine runs inside this process, which spares starting
an engine process and a worker process, vLLM's default.

Usage: python -P vllm_script.py --model FOLDER --prompts prompts.json --out out.json
"""

import argparse
import contextlib
import json
import os
import time
from pathlib import Path

import psutil

CORES = sorted(os.sched_getaffinity(0))

# vLLM reads these when it is imported or when it starts; the caller's own
# environment comes first.
DEFAULT_ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # engine and worker in this process
    "OMP_NUM_THREADS": str(len(CORES)),
    # Read only with multiprocessing on; "auto" would leave one core out.
    "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, CORES)),
    # vLLM 0.32.0 cannot load its own ahead-of-time compiled model back on CPU and
    # compiles anew at every start; without it, torch's compile cache is used.
    "VLLM_USE_AOT_COMPILE": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "HF_HUB_OFFLINE": "1",
}


def seconds_since_process_start() -> float:
    """Return the age of this process, interpreter start and imports included."""
    stat = Path("/proc/self/stat").read_text()
    # The command name, in parentheses, may hold spaces: count fields after it.
    start_ticks = int(stat.rpartition(")")[2].split()[19])
    start = start_ticks / os.sysconf("SC_CLK_TCK")
    return time.clock_gettime(time.CLOCK_BOOTTIME) - start


def peak_memory() -> int:
    """Return the sum of the peak resident sizes, in bytes, of this process and its children.

    Pages shared by several processes count once for each of them.
    """
    total = 0
    for process in [psutil.Process(), *psutil.Process().children(recursive=True)]:
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # ended meanwhile
            for line in Path(f"/proc/{process.pid}/status").read_text().splitlines():
                if line.startswith("VmHWM:"):
                    total += int(line.split()[1]) * 1024
    return total


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="folder in Transformers format")
    parser.add_argument("--prompts", type=Path, required=True, help="JSON list of lists of token ids")
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--max-new-tokens", type=int, default=400)
    parser.add_argument("--in-flight", type=int, default=64, help="most sequences run at a time")
    parser.add_argument("--max-model-len", type=int, default=1024, help="longest prompt and completion")
    parser.add_argument("--kv-cache-gib", type=float, default=4.0)
    parser.add_argument("--eager", action="store_true", help="skip compilation")
    return parser.parse_args()


def main() -> None:
    """Load the model, generate for all prompts at once and write the figures."""
    arguments = parse_arguments()
    for name, value in DEFAULT_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    token_ids: list[list[int]] = json.loads(arguments.prompts.read_text())

    load_start = time.perf_counter()
    # Imported only now: it reads the environment, and counts as loading.
    import vllm

    llm = vllm.LLM(
        model=arguments.model,
        dtype="bfloat16",
        skip_tokenizer_init=True,
        max_model_len=arguments.max_model_len,
        max_num_seqs=arguments.in_flight,
        kv_cache_memory_bytes=int(arguments.kv_cache_gib * 2**30),
        enforce_eager=arguments.eager,
    )
    load_seconds = time.perf_counter() - load_start

    # The eos token of the model's generation config stops a sequence, and is
    # kept as the last of its ids.
    sampling = vllm.SamplingParams(temperature=0.0, max_tokens=arguments.max_new_tokens, detokenize=False)
    prompts = [vllm.TokensPrompt(prompt_token_ids=ids) for ids in token_ids]
    generate_start = time.perf_counter()
    outputs = llm.generate(prompts, sampling, use_tqdm=False)
    generate_seconds = time.perf_counter() - generate_start

    generated = [list(output.outputs[0].token_ids) for output in outputs]
    result = {
        "load_seconds": load_seconds,
        "generate_seconds": generate_seconds,
        "tokens": sum(map(len, generated)),
        "version": vllm.__version__,
        "peak_memory": peak_memory(),
        "wall_seconds": seconds_since_process_start(),
        "ids": generated,
    }
    arguments.out.write_text(json.dumps(result))


if __name__ == "__main__":
    main()
