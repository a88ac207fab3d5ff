#!/usr/bin/env bash
# What the container of MLflow runs: as root it reads the secrets, then everything else as an ordinary user.
set -euo pipefail
S=${SECRETS:-/run/secrets}
say() { echo "mmdistill: $*" >&2; }

for name in database admin session; do
    [ -s "$S/$name" ] || { say "secrets/$name is missing or empty: infra/README.md says how the secrets are made"; exit 1; }
done
PGPASSWORD=$(cat "$S/database")
# Without keys the machine's own role speaks for it.
if [ -e "$S/s3-access-key" ]; then
    AWS_ACCESS_KEY_ID=$(cat "$S/s3-access-key")
    AWS_SECRET_ACCESS_KEY=$(cat "$S/s3-secret-key")
    export AWS_ACCESS_KEY_ID AWS_SECRET_ACCESS_KEY
    [ -n "$AWS_ACCESS_KEY_ID" ] && [ -n "$AWS_SECRET_ACCESS_KEY" ] || { say "secrets/s3-access-key or s3-secret-key is empty"; exit 1; }
fi
MLFLOW_AUTH_ADMIN_PASSWORD=$(cat "$S/admin")
MLFLOW_FLASK_SERVER_SECRET_KEY=$(cat "$S/session")
MLFLOW_BACKEND_STORE_URI=postgresql+psycopg2://mlflow@${DATABASE:-postgres:5432}/mlflow
AUTH_DATABASE_URI=${MLFLOW_BACKEND_STORE_URI}_auth
MLFLOW_AUTH_CONFIG_PATH=${TMPDIR:-/tmp}/auth.ini
HOME=${TMPDIR:-/tmp}
export PGPASSWORD MLFLOW_AUTH_ADMIN_PASSWORD MLFLOW_FLASK_SERVER_SECRET_KEY
export MLFLOW_BACKEND_STORE_URI AUTH_DATABASE_URI MLFLOW_AUTH_CONFIG_PATH HOME
cat >"$MLFLOW_AUTH_CONFIG_PATH" <<CONF
[mlflow]
default_permission = EDIT
database_uri = $AUTH_DATABASE_URI
admin_username = admin
authorization_function = mlflow.server.auth:authenticate_request_basic_auth
auth_cache_ttl_seconds = 60
CONF
as=()
[ "$(id -u)" != 0 ] || [ -z "${RUN_AS-10001}" ] || as=(setpriv --reuid="${RUN_AS-10001}" --regid="${RUN_AS-10001}" --clear-groups --no-new-privs)

states=$("${as[@]}" python "$(dirname "${BASH_SOURCE[0]}")/database.py" state)
case $states in
    *newer*)
        say "the databases were written by a newer MLflow than this image has"
        exit 1
        ;;
    *old*)
        if [ "${UPGRADE:-no}" != yes ]; then
            say "the databases are an older MLflow's: back them up (infra/README.md), then start once with UPGRADE=yes in .env"
            exit 1
        fi
        "${as[@]}" python -m mlflow db upgrade "$MLFLOW_BACKEND_STORE_URI"
        ;;
esac
exec "${as[@]}" python -m mlflow server --host "${HOST:-0.0.0.0}" --port "${PORT:-5000}" --workers "${WORKERS:-1}" \
    --app-name basic-auth --serve-artifacts --artifacts-destination "$ARTIFACTS"
