#!/bin/sh
# Publish one event from a shell, with kcat or else Kafka's own console producer (4.2 or newer).
#
#   publish.sh TOPIC KEY TYPE IDEMPOTENCY-KEY DATA
#   publish.sh account.events ada credits.granted case-4711 \
#       '{"user_id": "ada", "credits": 25, "pool": "purchased", "reason": "support case 4711"}'
#
# The same line again changes nothing: the idempotency key is the same.
set -eu
topic="${CREDITS_TOPIC_PREFIX:-}$1" key=$2 type=$3 idempotency_key=$4 data=$5

# A running `make run` says where Kafka is; in production the environment does.
stack=${CREDITS_HOME:-.credits}/stack.json
kafka=${CREDITS_KAFKA_BOOTSTRAP:-$(sed -n 's/.*"kafka_bootstrap": *"\([^"]*\)".*/\1/p' "$stack")}

if command -v kcat >/dev/null; then
    printf '%s' "$data" | kcat -P -b "$kafka" -t "$topic" -k "$key" \
        -H ce_specversion=1.0 -H ce_id="$(date +%s)-$$" -H ce_source=/shell -H ce_type="$type" \
        -H ce_idempotencykey="$idempotency_key" -H content-type=application/json
else
    attributes="ce_specversion:1.0,ce_id:$(date +%s)-$$,ce_source:/shell,ce_type:$type"
    attributes="$attributes,ce_idempotencykey:$idempotency_key,content-type:application/json"
    printf '%s\t%s\t%s\n' "$attributes" "$key" "$data" | kafka-console-producer.sh \
        --bootstrap-server "$kafka" --topic "$topic" \
        --reader-property parse.headers=true --reader-property parse.key=true
fi
