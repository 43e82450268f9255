#!/bin/sh
# Give a command over HTTP and be told at once what became of it: for support and for scripts, with the admin token.
#
#   ask.sh IDEMPOTENCY-KEY TYPE DATA
#   ask.sh case-4711 credits.granted \
#       '{"user_id": "ada", "credits": 25, "pool": "purchased", "reason": "support case 4711"}'
set -eu

# A running `make run` says where everything is; in production the environment does.
stack=${CREDITS_HOME:-.credits}/stack.json
api=${CREDITS_HTTP_URL:-$(sed -n 's/.*"http_url": *"\([^"]*\)".*/\1/p' "$stack")}
token=${CREDITS_ADMIN_TOKEN:-$(sed -n 's/.*"admin_token": *"\([^"]*\)".*/\1/p' "$stack")}

curl --silent --show-error --fail-with-body "$api/v1/commands" \
    -H "authorization: Bearer $token" -H "idempotency-key: $1" -H 'content-type: application/json' \
    --data "{\"type\": \"$2\", \"data\": $3}"
