"""The settings of the gateway's process."""

from __future__ import annotations

from dataclasses import dataclass

from sequoia.access import Access
from sequoia.config import setting


@dataclass(frozen=True, slots=True)
class GatewayConfig:
    """Serves the OpenAI API over HTTP, before one or several coordinators."""

    address: str = setting("127.0.0.1:50600", "the coordinator; several with commas: the next one where one is lost")
    listen: str = setting("127.0.0.1:8000", "address to listen on; port 0 takes a free one")
    model_names: str = setting("", "further names of the model, with commas, for clients that insist on one")
    api_keys: str = setting(
        "",
        "file with a line `SHA256` or `NAME:SHA256` for every key let in here; empty: keys are the coordinator's "
        "tokens, which it checks",
    )
    token_file: str = setting("", "with --api-keys: file with the token by which the coordinator knows the gateway")
    cors_origins: str = setting("", "origins whose web pages may ask, with commas; *: all; empty: none but our own")
    tls_cert: str = setting("", "file with the certificate chain (PEM); with --tls-key it serves HTTPS")
    tls_key: str = setting("", "file with the certificate's private key (PEM)")
    tls_ca: str = setting("", "file with the CAs (PEM) that the coordinator's certificate comes from")
    coordinator_cert: str = setting(
        "", "file with the certificate chain (PEM) that the coordinator is shown; empty: that of --tls-cert"
    )
    coordinator_key: str = setting("", "file with its private key (PEM)")
    insecure: bool = setting(False, "allow plain text to and from other hosts: whoever is on the way reads and writes")
    request_timeout_seconds: float = setting(600.0, "longest time that an answer may take, seconds")
    body_timeout_seconds: float = setting(30.0, "longest time that a request's body may take to arrive, seconds")
    max_body_bytes: int = setting(3 * 2**20, "largest body of a request, bytes; a coordinator takes 4 MiB")
    grace_seconds: int = setting(25, "time for running answers to end when it is told to stop, seconds")
    log_level: str = setting("info", "log level", choices=("debug", "info", "warning", "error"))

    def __post_init__(self) -> None:
        if bool(self.tls_cert) != bool(self.tls_key):
            raise ValueError("--tls-cert (SEQUOIA_TLS_CERT) and --tls-key (SEQUOIA_TLS_KEY) go together; give both")
        if bool(self.coordinator_cert) != bool(self.coordinator_key):
            flags = "--coordinator-cert (SEQUOIA_COORDINATOR_CERT) and --coordinator-key (SEQUOIA_COORDINATOR_KEY)"
            raise ValueError(f"{flags} go together; give both")
        if self.host_and_port is None:
            raise ValueError(
                f"--listen (SEQUOIA_LISTEN) is {self.listen!r}; it must be HOST:PORT, such as 127.0.0.1:8000"
            )
        for name in ("request_timeout_seconds", "body_timeout_seconds", "max_body_bytes", "grace_seconds"):
            if not getattr(self, name) > 0:
                raise ValueError(f"--{name.replace('_', '-')} (SEQUOIA_{name.upper()}) must be above 0")

    def access(self, token: str | None) -> Access:
        """To the coordinator, with the gateway's own token."""
        own = (self.coordinator_cert, self.coordinator_key) if self.coordinator_cert else (self.tls_cert, self.tls_key)
        access = Access(tls_ca=self.tls_ca, insecure=self.insecure)
        if self.tls_ca:
            access |= Access(tls_cert=own[0], tls_key=own[1])
        return access if token is None else access | Access(token=token)

    @property
    def host_and_port(self) -> tuple[str, int] | None:
        """Of `listen`; None where it is no such thing."""
        host, _, port = self.listen.rpartition(":")
        is_port = port.isascii() and port.isdigit() and int(port) < 2**16
        return (host.strip("[]"), int(port)) if host and is_port else None


def split(names: str) -> tuple[str, ...]:
    """The parts of a setting that is a list with commas."""
    return tuple(filter(None, (each.strip() for each in names.split(","))))
