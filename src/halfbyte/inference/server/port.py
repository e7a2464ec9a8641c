"""Where a server listens."""

import errno
import os
import socket

from halfbyte.errors import BadRequest


def listener(host: str, port: int) -> socket.socket:
    """Where clients come in. Raises BadRequest for a port that is taken, and for what is no address of this machine."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        made = socket.socket(family, kind, protocol)
    except (OSError, UnicodeError) as error:
        raise BadRequest(f"--host {host} is no address: {error}") from None
    if os.name == "posix":  # elsewhere it would let two servers share a port
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        made.bind(address)
    except OSError as error:
        made.close()
        if error.errno == errno.EADDRINUSE:
            raise BadRequest(f"port {port} of {host} is in use; name another with --port, or 0 for any") from None
        raise BadRequest(f"{host}:{port} cannot be listened at: {error.strerror}") from None
    return made


def url(listener: socket.socket) -> str:
    """Of a server."""
    host, port = listener.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"
