"""The runtimes that are measured against each other, each in a process of its own that answers one request a line.

`Worker(kind, path)` starts a process; `prefill` and `decode` run one turn there and return tokens a second. Prompts are
random token ids from a seed, the same for all; decoding is greedy from a single token. Between turns a process waits on
its standard input, and nobody's turn begins before the last one's thread pool has gone to sleep.
"""

from __future__ import annotations

import ctypes
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Protocol

import numpy as np

VOCABULARY = 49152
THREADS = 2
REST = 0.1  # seconds between turns: onnxruntime's threads look for work for 30 ms after the last, llama.cpp's for 10


class Contestant(Protocol):
    def prefill(self, ids: list[int]) -> int:
        """Forget everything, read `ids`, and choose the next token."""

    def step(self, token: int) -> int:
        """Append one token, and choose the next."""


class Edgekit:
    """A bundle, through the runtime that users have."""

    def __init__(self, path: str) -> None:
        from edgekit.runtime.session import Session

        self.engine = Session.open(path, context=1024, threads=THREADS).engine

    def prefill(self, ids: list[int]) -> int:
        self.engine.rewind(0)
        return int(self.engine.forward(ids)[-1].argmax())

    def step(self, token: int) -> int:
        return int(self.engine.forward([token])[-1].argmax())


class Genai:
    """onnxruntime-genai on a folder that its own builder made; its generator chooses the token itself."""

    def __init__(self, path: str) -> None:
        import onnxruntime_genai

        self.genai = onnxruntime_genai
        config = onnxruntime_genai.Config(path)
        self.model = onnxruntime_genai.Model(config)

    def prefill(self, ids: list[int]) -> int:
        parameters = self.genai.GeneratorParams(self.model)
        parameters.set_search_options(do_sample=False, max_length=1024, min_length=1024)
        self.generator = self.genai.Generator(self.model, parameters)
        self.generator.append_tokens(np.array(ids, np.int32))
        return self.step(0)

    def step(self, token: int) -> int:
        self.generator.generate_next_token()
        return 0


class LlamaCpp:
    """llama.cpp through its C functions: flash attention off and on were equal here; its default is taken."""

    CONTEXT = 1024

    def __init__(self, path: str) -> None:
        import llama_cpp

        self.c = llama_cpp
        llama_cpp.llama_backend_init()
        llama_cpp.llama_log_set(SILENT, None)
        model = llama_cpp.llama_model_load_from_file(path.encode(), llama_cpp.llama_model_default_params())
        parameters = llama_cpp.llama_context_default_params()
        parameters.n_ctx, parameters.n_batch, parameters.n_ubatch = self.CONTEXT, 512, 512
        if self.CONTEXT > 8192:  # longer than the model was trained for
            parameters.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED
            parameters.rope_freq_scale = 1 / 16
            parameters.n_seq_max, parameters.kv_unified = 2, True
        parameters.n_threads = parameters.n_threads_batch = THREADS
        self.context = llama_cpp.llama_init_from_model(model, parameters)
        self.memory = llama_cpp.llama_get_memory(self.context)

    def prefill(self, ids: list[int]) -> int:
        self.c.llama_memory_clear(self.memory, True)
        return self._decode(ids)

    def step(self, token: int) -> int:
        return self._decode([token])

    def _decode(self, ids: list[int]) -> int:
        tokens = (self.c.llama_token * len(ids))(*ids)
        if self.c.llama_decode(self.context, self.c.llama_batch_get_one(tokens, len(ids))):
            raise RuntimeError("llama_decode failed")
        logits = self.c.llama_get_logits_ith(self.context, -1)
        return int(np.ctypeslib.as_array(logits, (VOCABULARY,)).argmax())


class EdgekitLong(Edgekit):
    """A bundle with a long context. `fill` reads up to 8,192 tokens, and repeats what they left in the cache."""

    READ = 8192

    def __init__(self, path: str) -> None:
        from edgekit.runtime.session import Session

        self.engine = Session.open(path, threads=THREADS).engine

    def fill(self, tokens: int) -> None:
        ids = prompt(min(tokens, self.READ), 0)
        if len(self.engine.tokens) > len(ids) or self.engine.tokens != ids[: len(self.engine.tokens)]:
            self.engine.rewind(0)
        self.engine.forward(ids[len(self.engine.tokens) :] or ids[-1:])
        self.engine.reserve(tokens)
        for copy in range(1, tokens // self.READ):
            for name, part in self.engine.kept(self.READ).items():
                size = part.shape[2]
                self.engine._cache[name][0][:, :, copy * size : (copy + 1) * size] = part
            self.engine.tokens.extend(ids)
        self.filled = tokens

    def forget(self) -> None:
        self.engine.rewind(self.filled)


class LlamaCppLong(LlamaCpp):
    """llama.cpp with a long context, flash attention, and its own linear rope scaling.

    `fill` reads up to 8,192 tokens. Beyond, copies of what they left join the sequence, each turned on to its
    positions, so that a token attends to as many cells as after a prompt of that length.
    """

    READ = 8192
    COPIES = 4
    CONTEXT = COPIES * READ + 512

    def fill(self, tokens: int) -> None:
        c, memory, read = self.c, self.memory, min(tokens, self.READ)
        c.llama_memory_clear(memory, True)
        ids = prompt(read, 0)
        for start in range(0, read, 512):
            self._decode(ids[start : start + 512])
        if tokens > read:
            size = c.llama_state_seq_get_size(self.context, 0)
            state = (ctypes.c_uint8 * size)()
            if c.llama_state_seq_get_data(self.context, state, size, 0) != size:
                raise RuntimeError("the state could not be read")
        for copy in range(1, tokens // read):
            if not c.llama_state_seq_set_data(self.context, state, size, 1):
                raise RuntimeError("the state could not be written")
            c.llama_memory_seq_add(memory, 1, 0, -1, copy * read)
            c.llama_memory_seq_cp(memory, 1, 0, 0, -1)
            c.llama_memory_seq_rm(memory, 1, -1, -1)
        self.filled = tokens
        last = c.llama_memory_seq_pos_max(memory, 0)
        if last != tokens - 1:
            raise RuntimeError(f"the context must end at {tokens - 1}: it ends at {last}")

    def forget(self) -> None:
        self.c.llama_memory_seq_rm(self.memory, 0, self.filled, -1)


KINDS = {
    "edgekit-long": EdgekitLong,
    "llama.cpp-long": LlamaCppLong,
    "edgekit": Edgekit,
    "onnxruntime-genai": Genai,
    "llama.cpp": LlamaCpp,
}
SILENT = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)(lambda level, text, user: None)


class Worker:
    """A contestant in a process of its own."""

    def __init__(self, kind: str, path: Path | str) -> None:
        command = [sys.executable, __file__, kind, str(path)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.cold = self._ask("cold")  # milliseconds from opening to the first token of a prompt of 512
        self.private_mb = self._ask("private")

    def prefill(self, tokens: int, seed: int) -> float:
        return self._ask("prefill", tokens, seed)

    def decode(self, tokens: int, seed: int) -> float:
        return self._ask("decode", tokens, seed)

    def fill(self, tokens: int) -> None:
        """Bring a long contestant's context to `tokens` tokens."""
        self._ask("fill", tokens, 0)

    def steps(self, tokens: int) -> float:
        """Tokens a second of decoding `tokens` more, which are forgotten again."""
        return self._ask("steps", tokens, 0)

    def close(self) -> None:
        self.process.communicate()

    def _ask(self, *request: object) -> float:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        time.sleep(REST)
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            sys.exit(f"the contestant {' '.join(map(str, self.process.args[2:]))} ended")  # type: ignore[index]
        return float(answer)


def prompt(tokens: int, seed: int) -> list[int]:
    return np.random.default_rng(seed).integers(0, VOCABULARY, tokens).tolist()


def private_mb() -> float:
    """Memory of this process that no file backs, in megabytes."""
    with open("/proc/self/smaps_rollup") as lines:
        fields = dict(line.split(":", 1) for line in lines if ":" in line and "kB" in line)
    return int(fields["Anonymous"].split()[0]) * 1024 / 1e6


def serve(kind: str, path: str) -> None:
    make = KINDS[kind]
    if kind.startswith("edgekit"):
        import edgekit.runtime.session  # noqa: F401  imports are not what is timed
    elif kind.startswith("llama.cpp"):
        import llama_cpp  # noqa: F401
    else:
        import onnxruntime_genai  # noqa: F401
    before = private_mb()
    clock = time.perf_counter()
    contestant: Contestant = make(path)
    loaded = private_mb() - before
    contestant.prefill(prompt(512, 0))
    cold = 1e3 * (time.perf_counter() - clock)
    for line in sys.stdin:
        request, *numbers = json.loads(line)
        print(_answer(contestant, request, numbers, {"cold": cold, "private": loaded}), flush=True)


def _answer(contestant: Contestant, request: str, numbers: list[int], facts: dict[str, float]) -> float:
    if request in facts:
        return facts[request]
    tokens, seed = numbers
    if isinstance(contestant, EdgekitLong | LlamaCppLong) and request in ("fill", "steps"):
        clock = time.perf_counter()
        if request == "fill":
            contestant.fill(tokens)
        else:
            token = 0
            for _ in range(tokens):
                token = contestant.step(token)
        rate = tokens / (time.perf_counter() - clock)
        contestant.forget()
        return rate
    ids = prompt(tokens if request == "prefill" else 1, seed)
    clock = time.perf_counter()
    token = contestant.prefill(ids)
    if request == "decode":
        clock = time.perf_counter()
        for _ in range(tokens):
            token = contestant.step(token)
    return tokens / (time.perf_counter() - clock)


if __name__ == "__main__":
    serve(*sys.argv[1:3])
