"""The settings of a worker, filled once from flags and SEQUOIA_* variables."""

from __future__ import annotations

from dataclasses import MISSING, dataclass

from sequoia.config import ENGINES, OFFLOADS, QUANTIZATIONS, num_bytes, setting
from sequoia.tls import TlsSettings

# Ranks run the modules of `transformers` as they are.
_BESIDE_RANKS: dict[str, tuple[str | bool, ...]] = {
    "engine": ("auto", "transformers"),
    "quantization": ("auto", "none"),
    "offload": ("none",),
    "deterministic": (False,),
}


@dataclass(frozen=True, slots=True)
class WorkerConfig(TlsSettings):
    """Serves one model. The same settings for a draft and a verify worker."""

    model: str = setting(MISSING, "model: a packaged name, a hub id, a folder or a GGUF file")
    listen: str = setting("127.0.0.1:0", "address to listen on; port 0 takes a free one, unix:PATH a socket")
    revision: str = setting("", "revision of a hub model: branch, tag or commit")
    dtype: str = setting("auto", "element type", choices=("auto", "float32", "bfloat16", "float16"))
    engine: str = setting("auto", "what runs the layers; auto: the first that can", choices=ENGINES)
    quantization: str = setting(
        "auto",
        "weights of the linear layers; auto: int8 for a draft in bfloat16 on the CPU, int4 for one of an offloaded "
        "model, none for all others",
        choices=("auto", *QUANTIZATIONS),
    )
    device: str = setting("auto", "device", choices=("auto", "cpu", "cuda"))
    num_slots: int = setting(32, "sessions at a time, at most")
    kv_tokens: int = setting(
        0, "KV memory of all sessions together, in tokens, their trees included; 0: for 4 sessions with a whole context"
    )
    prefix_reuse: str = setting(
        "on", "a session has the KV rows that others made of the same first tokens", choices=("on", "off")
    )
    context_length: int = setting(0, "longest session in tokens; 0: the model's own, at most 8192")
    max_tree_size: int = setting(64, "largest tree in nodes, root included")
    offload: str = setting(
        "none",
        "keep weights on a slower tier and stream them through memory in every forward: in files of the cache folder "
        "for a CPU (disk), in the host's memory for a GPU (host); auto: either, where they do not fit",
        choices=OFFLOADS,
    )
    memory_limit: str = setting(
        "", "offloaded: most memory of the process, on a GPU most of its memory, as 2GiB; empty: what is free"
    )
    resident_layers: int = setting(-1, "offloaded: layers that stay in memory; -1: as many as fit")
    prefill_chunk: int = setting(256, "most prompt tokens of one session in a forward")
    tensor_parallel: int = setting(
        1, "verify worker: processes that have the model together, a part each, started by torchrun; 1: this one alone"
    )
    num_threads: int = setting(0, "CPU threads; 0: one for each core this process may use")
    draft_ahead: str = setting(
        "auto",
        "draft worker: grow the next tree while the last is verified; auto: while it pays, on a device of its own",
        choices=("auto", "on", "off"),
    )
    ngram: str = setting(
        "off",
        "draft worker: mix what the session's own tokens repeat into the draft's distributions",
        choices=("on", "off"),
    )
    deterministic: bool = setting(
        False, "rows that do not depend on what shares their forward, also where that is slower; native ones never do"
    )
    trust_remote_code: bool = setting(False, "run Python code that comes with the model")
    cache_dir: str = setting("", "folder for fetched models; empty: the user's cache folder")
    log_level: str = setting("info", "log level", choices=("debug", "info", "warning", "error"))

    def __post_init__(self) -> None:
        TlsSettings.__post_init__(self)
        for name, least in (("num_slots", 1), ("max_tree_size", 1), ("prefill_chunk", 1), ("tensor_parallel", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"--{name.replace('_', '-')} (SEQUOIA_{name.upper()}) must be at least {least}")
        try:
            num_bytes(self.memory_limit or "0")
        except ValueError as error:
            raise ValueError(f"--memory-limit (SEQUOIA_MEMORY_LIMIT): {error}") from error
        if self.resident_layers < -1:
            raise ValueError("--resident-layers (SEQUOIA_RESIDENT_LAYERS) must be -1 or more")
        if self.offload == "none" and (self.memory_limit or self.resident_layers >= 0):
            name = "memory-limit" if self.memory_limit else "resident-layers"
            flag = f"--{name} (SEQUOIA_{name.upper().replace('-', '_')})"
            raise ValueError(f"{flag} is for --offload disk, host or auto")
        if self.tensor_parallel > 1:
            self._check_beside_ranks()
        if self.context_length < 0 or self.num_threads < 0 or self.kv_tokens < 0:
            raise ValueError("--context-length, --num-threads and --kv-tokens must not be negative")

    def _check_beside_ranks(self) -> None:
        for name, allowed in _BESIDE_RANKS.items():
            if (value := getattr(self, name)) not in allowed:
                flag, good = f"--{name} (SEQUOIA_{name.upper()})", " or ".join(map(str, allowed))
                raise ValueError(f"{flag} is {value}; with --tensor-parallel it must be {good}")
