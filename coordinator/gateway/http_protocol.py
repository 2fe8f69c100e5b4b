"""HTTP whose heads end: uvicorn gathers headers as long as they come."""

from __future__ import annotations

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

MOST_HEAD_BYTES = 64 * 2**10
_TOO_LARGE = b"HTTP/1.1 431 Request Header Fields Too Large\r\nconnection: close\r\ncontent-length: 0\r\n\r\n"


class BoundedHttp(HttpToolsProtocol):
    """Hangs up on a request whose line and headers are longer than that and have not come to their end."""

    _is_in_head, _num_head_bytes = True, 0

    def data_received(self, data: bytes) -> None:
        """A piece has arrived, of at most 256 KiB."""
        super().data_received(data)
        if not self._is_in_head:
            return
        self._num_head_bytes += len(data)
        if self._num_head_bytes > MOST_HEAD_BYTES and not self.transport.is_closing():
            self.transport.write(_TOO_LARGE)
            self.transport.close()

    def on_message_begin(self) -> None:
        """The next request of this connection."""
        super().on_message_begin()
        self._is_in_head, self._num_head_bytes = True, 0

    def on_headers_complete(self) -> None:
        """What follows is its body."""
        super().on_headers_complete()
        self._is_in_head = False
