"""uvicorn's protocol with a limit on what comes before a body, for which httptools has none."""

from __future__ import annotations

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

MAX_HEAD_BYTES = 65536


class BoundedProtocol(HttpToolsProtocol):
    """Refuses a request line with headers of more than :data:`MAX_HEAD_BYTES`, which no key guards."""

    _is_in_head = True
    _num_head_bytes = 0

    def data_received(self, data: bytes) -> None:
        """Parse more bytes."""
        if self._is_in_head:
            self._num_head_bytes += len(data)
        super().data_received(data)
        if self._is_in_head and self._num_head_bytes > MAX_HEAD_BYTES and not self.transport.is_closing():
            self.send_400_response(f"The request has more than {MAX_HEAD_BYTES} bytes of headers.")

    def on_headers_complete(self) -> None:
        """Begin a request."""
        self._is_in_head = False
        self._num_head_bytes = 0
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        """End a request's body; what comes next is another head."""
        self._is_in_head = True
        super().on_message_complete()
