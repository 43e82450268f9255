#!/bin/sh
# Make the secrets that docker-compose.yml mounts: random ones, in deploy/secrets, which git ignores.
# What is there already is left alone, so put yours in place before or after: Stripe's signing secret, tokens.
set -eu
folder=${1:-"$(dirname "$0")/secrets"}
mkdir -p "$folder"
# Containers read the files as users of their own, so the folder keeps other users of this machine out, not the files.
chmod 700 "$folder"
umask 022

random() { head -c 32 /dev/urandom | od -An -v -tx1 | tr -d ' \n'; }
secret() { [ -s "$folder/$1" ] || printf '%s' "$2" > "$folder/$1"; }

for name in postgres_password database_app_password database_owner_password read_tokens admin_tokens session_key grafana_password; do
    secret "$name" "$(random)"
done
# Stripe's comes from its dashboard; until then only what this secret signs is taken.
secret stripe_webhook_secrets "whsec_$(random)"
secret database_url "postgresql://credits_app:$(cat "$folder/database_app_password")@postgres:5432/credits"
secret database_owner_url "postgresql://credits_migrator:$(cat "$folder/database_owner_password")@postgres:5432/credits"
printf 'Secrets are in %s; read_tokens and admin_tokens are what callers of the gateway present.\n' "$folder"
