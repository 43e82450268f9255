"""The HTTP side: Stripe's webhooks in, balances and health out.

Hides FastAPI, uvicorn, and that Kafka and PostgreSQL may be away: the gateway starts without them, answers 503
for what needs them, and recovers when they come back. Invariants: a webhook is answered 200 only after the
broker acknowledged its exact bytes; nothing but liveness, readiness, metrics and the API's description is
readable without a token; an error never shows what is inside.
"""

from workers.gateway.app import create_app
from workers.gateway.serve import serve_gateway

__all__ = ["create_app", "serve_gateway"]
