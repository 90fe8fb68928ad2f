"""Runner for llama.cpp, through llama-cpp-python: plain decoding of a GGUF file."""

from __future__ import annotations

import os
from itertools import islice
from typing import Any

import llama_cpp  # type: ignore[import-not-found]


class Peer:
    """A llama.cpp context with OMP_NUM_THREADS threads, or one per core. Decodes one prompt at a time."""

    def __init__(self, gguf: str, length: int, **_: Any) -> None:
        threads = int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1)
        self._llama = llama_cpp.Llama(
            gguf, n_ctx=length, n_threads=threads, n_threads_batch=threads, verbose=False
        )
        size = os.path.getsize(gguf)
        self.about = {
            "version": llama_cpp.__version__,
            "threads": threads,
            "weights": f"{os.path.basename(gguf)}, {size / 1e6:.0f} MB, {self._file_type()}",
        }

    def _file_type(self) -> str:
        """The quantization type of most tensors, such as Q4_1."""
        file_type, prefix = self._llama.metadata.get("general.file_type"), "LLAMA_FTYPE_MOSTLY_"
        names_by_code = {
            str(getattr(llama_cpp, name)): name for name in dir(llama_cpp) if name.startswith(prefix)
        }
        return names_by_code.get(str(file_type), "of unknown type").removeprefix(prefix)

    def run(self, contestant: str, prompts: list[list[list[int]]], tokens: int) -> dict[str, Any]:
        """Decode the prompts greedily, one after another, without reusing the KV cache."""
        token_ids = []
        for prompt in prompts:
            self._llama.reset()
            token_ids.append(list(islice(self._llama.generate(prompt[0], temp=0.0), tokens)))
        return {"token_ids": token_ids}
