"""uvicorn's protocol, mended: a limit on what comes before a body, and no other protocol offered."""

from __future__ import annotations

import re

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

MAX_HEAD_BYTES = 65536
_UPGRADE = re.compile(rb"\nupgrade(?=[ \t]*:)", re.IGNORECASE)


class BoundedProtocol(HttpToolsProtocol):
    """Refuses a request line with headers of more than :data:`MAX_HEAD_BYTES`, which no key guards.

    Clients that would rather speak HTTP/2 (Java's, ``curl --http2``) ask for it beside a body. A server may
    pass over that; httptools 0.9 passes over the body instead, so it is not shown such a header.
    """

    _is_in_head = True
    _num_head_bytes = 0

    def data_received(self, data: bytes) -> None:
        """Parse more bytes."""
        if self._is_in_head:
            self._num_head_bytes += len(data)
            head, end, body = data.partition(b"\r\n\r\n")
            data = _UPGRADE.sub(b"\nx-upgrade", head) + end + body
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
