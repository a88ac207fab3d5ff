#!/usr/bin/env bash
# The team's whole server stack on one Debian host, without containers: PostgreSQL, MLflow, nginx with TLS, and an S3 store.
#   stack.sh start|stop|status|env DIR [OPTION...]
#   eval "$(stack.sh env DIR)"     what clients need; it holds passwords
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
arguments stack.sh "$@"
serve=$INFRA/mlflow/serve.sh
ceph=$INFRA/objectstore/ceph.sh

start() {
    local made_store=no code=0
    # All that is missing is named at once, before anything is started.
    need setpriv:util-linux flock:util-linux curl:curl openssl:openssl postgres:postgresql nginx:nginx-light
    [ -n "$BUCKET" ] || need ceph-mon:ceph-mon ceph-osd:ceph-osd radosgw:radosgw
    make_dir
    keep_s3
    lock stack
    if [ -z "$BUCKET" ]; then
        "$ceph" status "$DIR" >/dev/null 2>&1 || made_store=yes
        "$ceph" start "$DIR" 9>&-
    fi
    "$serve" start "$DIR" 9>&- || code=$?
    [ $code = 0 ] || [ $made_store = no ] || "$ceph" stop "$DIR" 9>&- >&2
    [ $code = 0 ] || exit $code
    say "ready: eval \"\$($0 env $DIR)\""
}

case $VERB in
    start) start ;;
    stop)
        lock stack
        "$serve" stop "$DIR" 9>&-
        [ -n "$BUCKET" ] || "$ceph" stop "$DIR" 9>&-
        ;;
    status)
        code=0
        "$serve" status "$DIR" || code=3
        [ -n "$BUCKET" ] || "$ceph" status "$DIR" || code=3
        exit $code
        ;;
    env)
        "$serve" env "$DIR"
        s3_env
        if [ -n "$S3_TLS_PORT" ]; then
            export_line AWS_ENDPOINT_URL "https://${NAME:-$ADDRESS}:$S3_TLS_PORT"
            [ -n "$CERTIFICATE" ] || export_line AWS_CA_BUNDLE "$DIR/tls/ca.pem"
        fi
        ;;
esac
