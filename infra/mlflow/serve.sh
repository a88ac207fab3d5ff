#!/usr/bin/env bash
# MLflow's server for a team on a bare host, without containers: PostgreSQL, MLflow with accounts, nginx with TLS before it.
#   serve.sh start|stop|status|env DIR [OPTION...]
# Artifacts go through the server to an S3 store: --bucket names one (AWS_* say how to reach it), or Ceph's of the same DIR.
HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
. "$HERE/../lib.sh"
. "$HERE/tls.sh"
. "$HERE/parts.sh"
arguments serve.sh "$@"

start() {
    need_parts
    choose_python mlflow psycopg2 flask_wtf boto3
    make_dir
    keep_s3
    [ -n "$BUCKET" ] || [ -f "$DIR/ceph/made" ] || die "where do artifacts go? --bucket s3://NAME, or infra/stack.sh, which starts a store"
    lock mlflow
    unless_settled halt_part
    make_way postgres --postgres-port "$POSTGRES_PORT"
    make_way mlflow --mlflow-port "$MLFLOW_PORT"
    make_way proxy --port "$PORT" "$ADDRESS"
    [ -z "$S3_TLS_PORT" ] || make_way proxy --s3-tls-port "$S3_TLS_PORT" "$ADDRESS"
    make_tls
    make_secrets
    check_bucket
    start_postgres
    if ! alive mlflow; then
        migrate
        start_mlflow
    fi
    say "mlflow: answers on 127.0.0.1:$MLFLOW_PORT, $WORKERS worker(s)$AS_ROOT"
    start_proxy
    say "proxy: MLflow on $(address), $(artifacts)"
    settled
}

case $VERB in
    start) start ;;
    stop)
        lock mlflow
        for name in proxy mlflow postgres; do halt_part $name; done
        ;;
    status)
        code=0
        state postgres "127.0.0.1:$POSTGRES_PORT" || code=3
        state mlflow "127.0.0.1:$MLFLOW_PORT" || code=3
        state proxy "$ADDRESS:$PORT" || code=3
        exit $code
        ;;
    env)
        [ -s "$DIR/secrets/mlflow-admin" ] || die "$DIR: the server was not made yet: start it"
        export_line MLFLOW_TRACKING_URI "$(address)"
        export_line MLFLOW_TRACKING_USERNAME admin
        export_line MLFLOW_TRACKING_PASSWORD "$(cat "$DIR/secrets/mlflow-admin")"
        [ -z "$(trust)" ] || export_line MLFLOW_TRACKING_SERVER_CERT_PATH "$(trust)"
        ;;
esac
