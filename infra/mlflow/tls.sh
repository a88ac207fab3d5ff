# The proxy's certificate: the operator's, or one of an own CA. Sourced by serve.sh.
# shellcheck shell=bash
# DIR/tls: ca.pem (for clients), ca.key, server.pem and server.key (what the proxy shows).

make_ca() {
    [ ! -s "$DIR/tls/ca.pem" ] || return 0
    cat >"$DIR/tmp/ca.cnf" <<'CONF'
[req]
distinguished_name = name
x509_extensions = ca
prompt = no
[name]
CN = mmdistill's own CA
[ca]
basicConstraints = critical, CA:TRUE, pathlen:0
keyUsage = critical, keyCertSign, cRLSign
subjectKeyIdentifier = hash
CONF
    openssl req -x509 -new -newkey ec -pkeyopt ec_paramgen_curve:P-256 -noenc -days 3650 -config "$DIR/tmp/ca.cnf" \
        -keyout "$DIR/tls/ca.key" -out "$DIR/tls/ca.new" 2>>"$DIR/log/tls.log" || die "no CA could be made: see $DIR/log/tls.log"
    chmod 644 "$DIR/tls/ca.new"
    mv "$DIR/tls/ca.new" "$DIR/tls/ca.pem"
}

# The names that the certificate is for: the loopback ones, the proxy's address, the operator's name.
subject_names() {
    local names=DNS:localhost,IP:127.0.0.1 one
    for one in "$ADDRESS" "$NAME"; do
        case $one in
            '' | 0.0.0.0 | 127.0.0.1 | localhost) ;;
            *[!0-9.]*) names+=,DNS:$one ;;
            *) names+=,IP:$one ;;
        esac
    done
    echo "$names"
}

# Made anew when the names change, or when it has less than 30 days to go.
make_certificate() {
    local names
    names=$(subject_names)
    if [ "$(cat "$DIR/tls/names" 2>/dev/null)" = "$names" ] &&
        openssl x509 -in "$DIR/tls/server.pem" -noout -checkend 2592000 >/dev/null 2>&1; then
        return
    fi
    cat >"$DIR/tmp/server.ext" <<CONF
basicConstraints = critical, CA:FALSE
keyUsage = critical, digitalSignature
extendedKeyUsage = serverAuth
subjectKeyIdentifier = hash
authorityKeyIdentifier = keyid
subjectAltName = $names
CONF
    {
        openssl req -new -newkey ec -pkeyopt ec_paramgen_curve:P-256 -noenc -subj "/CN=mmdistill" \
            -keyout "$DIR/tls/server.key" -out "$DIR/tmp/server.csr"
        openssl x509 -req -in "$DIR/tmp/server.csr" -CA "$DIR/tls/ca.pem" -CAkey "$DIR/tls/ca.key" -days 397 \
            -set_serial "0x$(openssl rand -hex 16)" -extfile "$DIR/tmp/server.ext" -out "$DIR/tls/server.pem"
    } 2>>"$DIR/log/tls.log" || die "no certificate could be made: see $DIR/log/tls.log"
    echo "$names" >"$DIR/tls/names"
    say "tls: certificate for $names"
}

# The operator's files may be root's alone: the proxy gets copies.
copy_certificate() {
    local by hint="openssl x509 -in $CERTIFICATE -noout -text shows what it is"
    [ -r "$CERTIFICATE" ] && [ -r "$KEY" ] || die "the certificate $CERTIFICATE or its key $KEY can't be read"
    openssl x509 -in "$CERTIFICATE" -noout -checkend 0 >/dev/null 2>&1 || die "$CERTIFICATE: no certificate, or an expired one; $hint"
    # openssl's -checkip agrees to anything that is no address.
    [[ $NAME =~ ^[0-9.]+$ ]] && by=-checkip || by=-checkhost
    openssl x509 -in "$CERTIFICATE" -noout $by "$NAME" | grep -q 'does match' || die "$CERTIFICATE: is not for $NAME; $hint"
    [ "$(openssl x509 -in "$CERTIFICATE" -noout -pubkey)" = "$(openssl pkey -in "$KEY" -pubout 2>/dev/null </dev/null)" ] ||
        die "$KEY is not the key of $CERTIFICATE, or it has a passphrase"
    cat "$CERTIFICATE" >"$DIR/tls/server.pem"
    cat "$KEY" >"$DIR/tls/server.key"
    rm -f "$DIR/tls/names"
}

# The file by which clients know the proxy; nothing where a public CA signed the operator's certificate.
trust() { if [ -z "$CERTIFICATE" ]; then echo "$DIR/tls/ca.pem"; else echo "$CA"; fi; }

make_tls() {
    if [ -n "$CERTIFICATE" ]; then
        copy_certificate
    else
        make_ca
        make_certificate
    fi
    give "$DIR"/tls/*
    chmod 644 "$DIR"/tls/*.pem
}
