"""``python -m workers.healthcheck``: whether the process of this container is ready, as an exit status (0 or 1).

It asks the worker's `/readyz` at CREDITS_WORKER_PORT where that is set, else the gateway's at CREDITS_HTTP_PORT, and says what
it was answered. It imports nothing of the service: it runs every few seconds, beside work.
"""

import http
import http.client
import os
import sys

SECONDS = 4.0
ANSWER_BYTES_MAX = 4096


def main() -> int:
    """Ask once; the exit status."""
    port = int(os.environ.get("CREDITS_WORKER_PORT") or os.environ.get("CREDITS_HTTP_PORT") or 8080)
    host = os.environ.get("CREDITS_HTTP_HOST", "127.0.0.1")
    # One that listens on every address is reached at this one.
    reached_at = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104 - nothing is bound here
    connection = http.client.HTTPConnection(reached_at, port, timeout=SECONDS)
    try:
        connection.request("GET", "/readyz")
        answer = connection.getresponse()
        told = answer.read(ANSWER_BYTES_MAX).decode(errors="replace").strip()
    except (OSError, http.client.HTTPException) as error:
        sys.stdout.write(f"{reached_at}:{port} does not answer: {error}\n")
        return 1
    finally:
        connection.close()
    sys.stdout.write(f"{answer.status} {told}\n")
    return 0 if answer.status == http.HTTPStatus.OK else 1


if __name__ == "__main__":
    sys.exit(main())
