"""The Python client: NumPy arrays in, NumPy arrays out, over any of the gateway's encodings.

    with Client("127.0.0.1:8000") as client:
        answer = client.infer("digits", {"image": image})
        answer.outputs["label"]

`AsyncClient` is the same for asyncio. A call's way: `encoding` turns arrays into a body, `failover`
chooses an address from `addresses` and says what is tried again, `transport` sends, and `errors` turns
what came back into the gateway's own errors.
"""

from gateway.client.asynchronous import AsyncClient
from gateway.client.encoding import Answer
from gateway.client.errors import BadAnswer, ConnectionFailed, ConnectionLost
from gateway.client.synchronous import Client

__all__ = ["Answer", "AsyncClient", "BadAnswer", "Client", "ConnectionFailed", "ConnectionLost"]
