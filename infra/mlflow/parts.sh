# PostgreSQL, MLflow and the proxy, a few functions each. Sourced by serve.sh, backup.sh and restore.sh.
# shellcheck shell=bash
# Databases: mlflow (runs, metrics, the registry) and mlflow_auth (accounts), both of the role mlflow.

DATABASES=(mlflow mlflow_auth)

need_parts() {
    need postgres:postgresql initdb:postgresql psql:postgresql nginx:nginx-light openssl:openssl curl:curl
    local made
    made=$(cat "$DIR/postgres/data/PG_VERSION" 2>/dev/null) || return 0
    [ ! -d "/usr/lib/postgresql/$made/bin" ] || PATH=/usr/lib/postgresql/$made/bin:$PATH
    [[ "$(postgres --version)" == *" $made."* ]] ||
        die "$DIR was written by PostgreSQL $made, here is $(postgres --version): install postgresql-$made (or restore a backup into a new DIR)"
}

host() { if [ -n "$NAME" ]; then echo "$NAME"; else echo "$ADDRESS"; fi; }
address() { echo "https://$(host):$PORT"; }
here() { if [ "$ADDRESS" = 0.0.0.0 ]; then echo 127.0.0.1; else echo "$ADDRESS"; fi; }
artifacts() { s3_env | sed -n 's/^export MMDISTILL_BUCKET=\(.*\)$/artifacts in \1\/mlflow/p'; }

halt_part() {
    case $1 in
        postgres) halt postgres INT ;; # "fast": clients are cut off, what was committed is on disk
        proxy) halt proxy QUIT ;;      # answers what it has begun
        mlflow) halt mlflow TERM group ;;
        *) halt "$1" ;;
    esac
}

# Made once. mlflow.env is what MLflow finds in its environment, and nothing else of the caller's that it would heed.
make_secrets() {
    local secrets=$DIR/secrets names name
    for name in postgres mlflow-database mlflow-admin mlflow-session; do secret "$secrets/$name"; done
    printf '*:*:*:%s:%s\n' postgres "$(cat "$secrets/postgres")" mlflow "$(cat "$secrets/mlflow-database")" >"$secrets/pgpass"
    cat >"$secrets/auth.ini" <<CONF
[mlflow]
default_permission = EDIT
database_uri = $(database_uri mlflow_auth)
admin_username = admin
authorization_function = mlflow.server.auth:authenticate_request_basic_auth
auth_cache_ttl_seconds = 60
CONF
    names="localhost,localhost:*,127.0.0.1,127.0.0.1:*,$(host),$(host):*"
    {
        # shellcheck disable=SC2016
        echo 'unset "${!MLFLOW_@}" "${!AWS_@}" "${!PG@}"'
        s3_env
        export_line HOME "$DIR/tmp"
        export_line TMPDIR "$DIR/tmp"
        export_line PGPASSFILE "$secrets/pgpass"
        export_line MLFLOW_BACKEND_STORE_URI "$(database_uri mlflow)"
        export_line AUTH_DATABASE_URI "$(database_uri mlflow_auth)"
        export_line MLFLOW_AUTH_CONFIG_PATH "$secrets/auth.ini"
        export_line MLFLOW_AUTH_ADMIN_PASSWORD "$(cat "$secrets/mlflow-admin")"
        export_line MLFLOW_FLASK_SERVER_SECRET_KEY "$(cat "$secrets/mlflow-session")"
        export_line MLFLOW_SERVER_ENABLE_JOB_EXECUTION false
        export_line MLFLOW_SERVER_ALLOWED_HOSTS "$names"
        export_line MLFLOW_SERVER_CORS_ALLOWED_ORIGINS "https://$(host),$(address),https://localhost:$PORT,https://127.0.0.1:$PORT"
        export_line MLFLOW_DISABLE_TELEMETRY true
        export_line DO_NOT_TRACK true
        export_line GIT_PYTHON_REFRESH quiet
    } >"$secrets/mlflow.env"
    give "$secrets"/*
}
# Without a password: libpq takes it from the file that PGPASSFILE names. The driver is named, for SQLAlchemy's default changed.
database_uri() { echo "postgresql+psycopg2://mlflow@127.0.0.1:$POSTGRES_PORT/$1"; }

# python_ SCRIPT ARGUMENT...: a script of this folder, with MLflow's environment. By standard input, for the services' user
# need not be able to read this folder. `reader` is the same as who called, who may write where that user may not.
python_() { run_script "$1" "${AS_PY[@]}" "$PY" - "${@:2}"; }
reader() { run_script "$1" "$PY" - "${@:2}"; }
run_script() {
    local script=$HERE/$1
    shift
    # shellcheck disable=SC1091
    (. "$DIR/secrets/mlflow.env" && cd "$DIR/tmp" && exec "$@" <"$script" 2>>"$DIR/log/mlflow-tools.log")
}
mlflow_() {
    # shellcheck disable=SC1091
    (. "$DIR/secrets/mlflow.env" && cd "$DIR/tmp" && exec "${AS_PY[@]}" "$PY" -m "$@" >>"$DIR/log/mlflow-tools.log" 2>&1)
}
# pg PROGRAM ARGUMENT...: a client of PostgreSQL's, as its superuser.
pg() {
    local program=$1
    shift
    (cd "$DIR/tmp" && PGPASSFILE=$DIR/secrets/pgpass exec "${AS[@]}" "$program" -h 127.0.0.1 -p "$POSTGRES_PORT" -U postgres "$@")
}
sql() { pg psql -d postgres -X -q -A -t -v ON_ERROR_STOP=1 "$@"; }

check_bucket() { local said; said=$(python_ objects.py check) || die "the S3 store: ${said:-was not asked: see $DIR/log/mlflow-tools.log}"; }

# ---- PostgreSQL ----------------------------------------------------------------------------------------------------

start_postgres() {
    local data=$DIR/postgres/data name
    if [ ! -d "$data" ]; then
        rm -rf "$DIR/postgres"
        mkdir "$DIR/postgres" && give "$DIR/postgres"
        (cd "$DIR/tmp" && "${AS[@]}" initdb -D "$data.new" -U postgres --auth=scram-sha-256 --pwfile="$DIR/secrets/postgres" \
            --encoding=UTF8 --locale=C.UTF-8 --data-checksums) >>"$DIR/log/postgres.log" 2>&1 ||
            die "no database could be made: see $DIR/log/postgres.log"
        mv "$data.new" "$data"
    fi
    # No socket: its path has a limit of length. The password is asked on 127.0.0.1 as well.
    alive postgres || daemon postgres "${AS[@]}" postgres -D "$data" -c listen_addresses=127.0.0.1 -c port="$POSTGRES_PORT" \
        -c unix_socket_directories=
    wait_for postgres 120 pg psql -d postgres -X -c 'SELECT 1'
    if [ "$(sql -c "SELECT 1 FROM pg_roles WHERE rolname = 'mlflow'")" != 1 ]; then
        printf "SET log_min_error_statement = panic; CREATE ROLE mlflow LOGIN PASSWORD '%s';" "$(cat "$DIR/secrets/mlflow-database")" |
            sql || die "the role mlflow could not be made: see $DIR/log/postgres.log"
    fi
    for name in "${DATABASES[@]}"; do
        [ "$(sql -c "SELECT 1 FROM pg_database WHERE datname = '$name'")" = 1 ] || sql -c "CREATE DATABASE $name OWNER mlflow"
    done
    say "postgres: answers on 127.0.0.1:$POSTGRES_PORT"
}

# dump DATABASE FILE: all of it, in pg_dump's custom format, and readable.
dump() {
    pg pg_dump --format=custom --dbname="$1" >"$2" 2>>"$DIR/log/postgres-tools.log" && "${AS[@]}" pg_restore --list >/dev/null <"$2" ||
        die "the database $1 could not be dumped: see $DIR/log/postgres-tools.log"
}

# keep_dumps WHY: both databases in DIR/backups/WHY-TIME.
keep_dumps() {
    local into name
    into=$DIR/backups/$1-$(date -u +%Y%m%dT%H%M%SZ)
    mkdir "$into.new"
    for name in "${DATABASES[@]}"; do dump "$name" "$into.new/$name.dump"; done
    mv "$into.new" "$into"
    give -R "$into"
    echo "$into"
}

# ---- MLflow --------------------------------------------------------------------------------------------------------

# MLflow refuses a schema that is not its own release's: an older one is brought up, dumped before.
migrate() {
    local states kept
    states=$(python_ database.py state) || die "MLflow can't read its databases: see $DIR/log/mlflow-tools.log"
    [[ $states != *newer* ]] || die "$DIR was written by a newer MLflow than $PY has: install that release again, or a newer one"
    case $states in
        *old*)
            kept=$(keep_dumps before-upgrade)
            say "mlflow: an older release's databases, kept in $kept: upgrading"
            ;;
        *empty*) ;;
        *) return ;;
    esac
    mlflow_ mlflow db upgrade "$(database_uri mlflow)" && mlflow_ mlflow.server.auth db upgrade --url "$(database_uri mlflow_auth)" ||
        die "MLflow's databases could not be upgraded: see $DIR/log/mlflow-tools.log${kept:+; what they were is in $kept}"
}

start_mlflow() {
    local bucket
    bucket=$(s3_env | sed -n 's/^export MMDISTILL_BUCKET=//p')
    ENVIRONMENT=$DIR/secrets/mlflow.env daemon mlflow "${AS_PY[@]}" "$PY" -m mlflow server --host 127.0.0.1 --port "$MLFLOW_PORT" \
        --workers "$WORKERS" --app-name basic-auth --serve-artifacts --artifacts-destination "$bucket/mlflow"
    wait_for mlflow 300 curl -sf "http://127.0.0.1:$MLFLOW_PORT/health"
}

# ---- the proxy -----------------------------------------------------------------------------------------------------

fill() { # FILE NAME=VALUE...: the text of a template
    local text pair
    text=$(cat "$1")
    shift
    for pair in "$@"; do text=${text//@${pair%%=*}@/${pair#*=}}; done
    printf '%s\n' "$text"
}

write_proxy() {
    mkdir -p "$DIR/nginx"
    fill "$HERE/nginx.conf.in" DIR="$DIR" >"$DIR/nginx/nginx.conf"
    fill "$HERE/proxy.conf.in" LISTEN="$ADDRESS:$PORT" UPSTREAM="127.0.0.1:$MLFLOW_PORT" \
        CERTIFICATE="$DIR/tls/server.pem" KEY="$DIR/tls/server.key" >"$DIR/nginx/server-mlflow.conf"
    rm -f "$DIR/nginx/server-s3.conf"
    [ -z "$S3_TLS_PORT" ] || fill "$HERE/proxy.conf.in" LISTEN="$ADDRESS:$S3_TLS_PORT" UPSTREAM="127.0.0.1:$S3_PORT" \
        CERTIFICATE="$DIR/tls/server.pem" KEY="$DIR/tls/server.key" >"$DIR/nginx/server-s3.conf"
    give -R "$DIR/nginx"
}

# The whole way: TLS, the account, MLflow, its database.
whole_way() {
    local verify=(--insecure)
    [ -z "$(trust)" ] || verify=(--cacert "$(trust)")
    printf 'user = "admin:%s"\n' "$(cat "$DIR/secrets/mlflow-admin")" |
        curl -sf -K - "${verify[@]}" --connect-to "$(host):$PORT:$(here):$PORT" "$(address)/api/2.0/mlflow/experiments/search?max_results=1"
}

start_proxy() {
    local as=("${AS[@]}")
    write_proxy
    if [ "$(id -u)" = 0 ] && { [ "$PORT" -lt 1024 ] || [ "${S3_TLS_PORT:-1024}" -lt 1024 ]; }; then
        as=("${AS[0]}" --inh-caps=+net_bind_service --ambient-caps=+net_bind_service "${AS[@]:1}")
    fi
    if alive proxy; then
        kill -HUP "$(pid_of proxy)" # a certificate that was renewed
    else
        daemon proxy "${as[@]}" nginx -e "$DIR/log/proxy.log" -p "$DIR" -c "$DIR/nginx/nginx.conf"
    fi
    wait_for proxy 120 whole_way
}
