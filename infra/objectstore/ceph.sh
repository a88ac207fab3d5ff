#!/usr/bin/env bash
# An S3 store on one machine, without containers: Ceph's RADOS gateway over one monitor and one OSD, on 127.0.0.1.
#   ceph.sh start|stop|status|env DIR [OPTION...]
# Its daemons know each other by keys (cephx). One copy of each object, on one disk: infra/mlflow/backup.sh makes the second.
. "$(dirname "${BASH_SOURCE[0]}")/../lib.sh"
arguments ceph.sh "$@"
C=$DIR/ceph
S3_BUCKET=mmdistill

ceph_() { timeout 20 "${AS[@]}" ceph -c "$C/ceph.conf" "$@"; }
osd_up() { [[ "$(ceph_ osd stat -f json)" == *'"num_up_osds":1'* ]]; }
gateway_answers() { curl -s -o "$DIR/tmp/s3.answer" "http://127.0.0.1:$S3_PORT/" && grep -q ListAllMyBuckets "$DIR/tmp/s3.answer"; }

write_conf() {
    local store=bluestore
    [ "$S3_STORE" = disk ] || store=memstore
    cat >"$C/ceph.conf" <<CONF
[global]
fsid = $(cat "$C/fsid")
mon host = v2:127.0.0.1:$MON_PORT
mon initial members = a
public network = 127.0.0.0/8
ms bind ipv6 = false
ms bind msgr1 = false
auth cluster required = cephx
auth service required = cephx
auth client required = cephx
keyring = $C/keys/\$name
run dir = $DIR/run
admin socket = $DIR/run/\$name.asok
crash dir = $C/crash
log file =
log to stderr = true
debug rocksdb = 0/5
debug bluestore = 0/5
debug bluefs = 0/5
debug osd = 0/5
debug rgw = 0/5
debug mon = 0/5
debug paxos = 0/5
osd pool default size = 1
osd pool default min size = 1
osd pool default pg num = 4
osd pool default pgp num = 4
osd pool default pg autoscale mode = off
osd crush chooseleaf type = 0
mon allow pool size one = true
mon warn on pool no redundancy = false
mon data avail crit = 1
mon data avail warn = 5
[mon]
mon data = $C/mon
[osd]
osd data = $C/osd
osd objectstore = $store
osd memory target = 1073741824
bluestore block size = $((S3_SIZE * 1024 * 1024 * 1024))
memstore device bytes = 4294967296
[client.rgw.a]
rgw frontends = beast endpoint=127.0.0.1:$S3_PORT
rgw data = $C/rgw
rgw enable usage log = false
rgw override bucket index max shards = 1
CONF
    give "$C/ceph.conf"
}

# The monitor's and the OSD's folders and keys. Until `made` is there nobody can have stored anything: what a start that was
# cut off left behind is made anew.
make_monitor() {
    rm -rf "$C"
    mkdir -p "$C"/{keys,mon,osd,rgw,crash}
    give "$C" "$C"/*
    cat /proc/sys/kernel/random/uuid >"$C/fsid"
    echo "$S3_STORE" >"$C/store"
    echo "$S3_SIZE" >"$C/size"
    write_conf
    {
        "${AS[@]}" ceph-authtool --create-keyring "$C/keys/mon.a" --gen-key -n mon. --cap mon 'allow *'
        "${AS[@]}" ceph-authtool --create-keyring "$C/keys/client.admin" --gen-key -n client.admin \
            --cap mon 'allow *' --cap osd 'allow *' --cap mgr 'allow *'
        "${AS[@]}" ceph-authtool "$C/keys/mon.a" --import-keyring "$C/keys/client.admin"
        make_map
        "${AS[@]}" ceph-mon -c "$C/ceph.conf" -i a --mkfs --monmap "$C/monmap" --keyring "$C/keys/mon.a"
    } >>"$DIR/log/ceph-make.log" 2>&1 || die "the monitor's store could not be made: see $DIR/log/ceph-make.log"
}
make_map() { "${AS[@]}" monmaptool --create --clobber --fsid "$(cat "$C/fsid")" --addv a "[v2:127.0.0.1:$MON_PORT]" "$C/monmap"; }

make_osd() {
    local id=$C/osd-id
    {
        cat /proc/sys/kernel/random/uuid >"$id"
        "${AS[@]}" ceph-authtool --create-keyring "$C/keys/osd.0" --gen-key -n osd.0
        ceph_ osd new "$(cat "$id")"
        ceph_ auth add osd.0 mon 'allow profile osd' osd 'allow *' -i "$C/keys/osd.0"
        "${AS[@]}" ceph-osd -c "$C/ceph.conf" -i 0 --mkfs --osd-uuid "$(cat "$id")"
        ceph_ auth get-or-create client.rgw.a mon 'allow rw' osd 'allow rwx' -o "$C/keys/client.rgw.a"
    } >>"$DIR/log/ceph-make.log" 2>&1 || die "the OSD's store could not be made: see $DIR/log/ceph-make.log"
}

# An account of the store, its keys made by Ceph itself, and the bucket. The secret goes to curl by its standard input.
make_account() {
    local answer key secret code
    answer=$(timeout 120 "${AS[@]}" radosgw-admin -c "$C/ceph.conf" user info --uid=mmdistill 2>/dev/null ||
        timeout 120 "${AS[@]}" radosgw-admin -c "$C/ceph.conf" user create --uid=mmdistill --display-name=mmdistill \
            2>>"$DIR/log/ceph-make.log") || die "no account could be made: see $DIR/log/ceph-make.log"
    key=$(sed -n 's/.*"access_key": "\([^"]*\)".*/\1/p' <<<"$answer" | head -n 1)
    secret=$(sed -n 's/.*"secret_key": "\([^"]*\)".*/\1/p' <<<"$answer" | head -n 1)
    [ -n "$key" ] && [ -n "$secret" ] || die "radosgw-admin gave no keys: see $DIR/log/ceph-make.log"
    { export_line AWS_ACCESS_KEY_ID "$key"; export_line AWS_SECRET_ACCESS_KEY "${secret//\\\//\/}"; } >"$DIR/secrets/ceph.env"
    give "$DIR/secrets/ceph.env"
    code=$(printf 'user = "%s:%s"\n' "$key" "${secret//\\\//\/}" | curl -s -K - -o "$DIR/tmp/s3.answer" -w '%{http_code}' \
        --aws-sigv4 aws:amz:us-east-1:s3 -H "x-amz-content-sha256: $(printf '' | sha256sum | cut -d ' ' -f 1)" -X PUT "http://127.0.0.1:$S3_PORT/$S3_BUCKET") || true
    [ "$code" = 200 ] || [ "$code" = 409 ] || die "the bucket $S3_BUCKET could not be made (HTTP $code): see $DIR/log/rgw.log"
}

start() {
    need ceph-mon:ceph-mon ceph-osd:ceph-osd radosgw:radosgw radosgw-admin:radosgw ceph:ceph-mon ceph-authtool:ceph-mon \
        monmaptool:ceph-mon curl:curl openssl:openssl
    make_dir
    lock s3
    unless_settled halt
    if [ -f "$C/made" ]; then
        [ "$(cat "$C/store")" = "$S3_STORE" ] || die "$C keeps its objects in: $(cat "$C/store"). This can't be changed later"
        S3_SIZE=$(cat "$C/size")
        if [ "$S3_STORE" = memory ] && ! alive osd; then
            for name in rgw mon; do halt $name; done
            rm "$C/made"
            say "ceph: what was kept in memory is gone; made anew"
        fi
    fi
    make_way mon --mon-port "$MON_PORT"
    make_way rgw --s3-port "$S3_PORT"
    alive osd || halt osd
    if [ ! -f "$C/made" ]; then
        for name in rgw osd mon; do halt $name; done
        make_monitor
    elif ! alive mon; then
        write_conf
        # The monitor's own address, should --mon-port be another than last time.
        { make_map && "${AS[@]}" ceph-mon -c "$C/ceph.conf" -i a --inject-monmap "$C/monmap"; } >>"$DIR/log/ceph-make.log" 2>&1 ||
            die "the monitor's store can't be opened: see $DIR/log/ceph-make.log"
    fi
    alive mon || daemon mon "${AS[@]}" ceph-mon -c "$C/ceph.conf" -i a -f
    wait_for mon 120 ceph_ -s
    say "mon: Ceph's monitor answers on 127.0.0.1:$MON_PORT"
    [ -f "$C/made" ] || make_osd
    alive osd || daemon osd "${AS[@]}" ceph-osd -c "$C/ceph.conf" -i 0 -f
    wait_for osd 120 osd_up
    say "osd: up, objects in ${S3_STORE}"
    alive rgw || daemon rgw "${AS[@]}" radosgw -c "$C/ceph.conf" -n client.rgw.a -f
    wait_for rgw 180 gateway_answers
    [ -f "$C/made" ] || make_account
    touch "$C/made"
    say "rgw: S3 on http://127.0.0.1:$S3_PORT, bucket $S3_BUCKET"
    settled
}

case $VERB in
    start) start ;;
    stop)
        lock s3
        for name in rgw osd mon; do halt $name; done
        ;;
    status)
        code=0
        state mon "127.0.0.1:$MON_PORT" || code=3
        state osd "$S3_STORE" || code=3
        state rgw "127.0.0.1:$S3_PORT" || code=3
        exit $code
        ;;
    env)
        [ -f "$C/made" ] || die "$DIR: the S3 store was not made yet: start it"
        export_line AWS_ENDPOINT_URL "http://127.0.0.1:$S3_PORT"
        cat "$DIR/secrets/ceph.env"
        export_line AWS_REGION us-east-1
        export_line AWS_DEFAULT_REGION us-east-1
        # pyarrow's uploads fail with HTTP 411 at stores other than AWS without these two.
        export_line AWS_REQUEST_CHECKSUM_CALCULATION when_required
        export_line AWS_RESPONSE_CHECKSUM_VALIDATION when_required
        export_line MMDISTILL_BUCKET "s3://$S3_BUCKET"
        ;;
esac
