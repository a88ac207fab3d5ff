# Shared by the scripts of infra/ and sourced by them: options, settings, ports, users, daemons.
# shellcheck shell=bash
set -euo pipefail
umask 077
INFRA=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

say() { printf '%s\n' "$*"; }
die() { printf '%s: %s\n' "$(basename "$0")" "$*" >&2; exit 1; }

# ---- options and settings ------------------------------------------------------------------------------------------
# Options are kept in DIR/settings, so that the next start needs none.

OPTIONS='
  --port PORT           HTTPS of MLflow (8443)              --mlflow-port PORT     MLflow itself, on 127.0.0.1 (5500)
  --address ADDRESS     where the proxy listens (127.0.0.1) --postgres-port PORT   PostgreSQL, on 127.0.0.1 (5544)
  --name HOST           the name that clients use           --s3-port PORT         the S3 store, on 127.0.0.1 (9003)
  --certificate FILE    the operator'"'"'s, with its chain       --mon-port PORT        Ceph'"'"'s monitor, on 127.0.0.1 (40300)
  --key FILE            its private key                     --s3-store disk|memory where Ceph keeps objects (disk)
  --ca FILE             who signed it, if not a public CA   --s3-size GIB          of Ceph'"'"'s disk, a sparse file (64)
  --workers N           MLflow'"'"'s processes (1)               --s3-tls-port PORT     S3 through the proxy as well
  --user NAME           who the services run as, for root   --bucket s3://NAME     an own S3 store instead of Ceph; how
                        (postgres)                                                 to reach it: AWS_* of the environment
  --python FILE         with the extra [server] installed'

defaults() {
    PORT=8443 ADDRESS=127.0.0.1 NAME='' CERTIFICATE='' KEY='' CA='' WORKERS=1 USER_NAME='' PYTHON=''
    MLFLOW_PORT=5500 POSTGRES_PORT=5544 S3_PORT=9003 S3_TLS_PORT='' MON_PORT=40300 S3_STORE=disk S3_SIZE=64 BUCKET='' BUCKET_GIVEN=no
}
DAEMONS=(mon osd rgw postgres mlflow proxy)
SETTINGS=(PORT ADDRESS NAME CERTIFICATE KEY CA WORKERS USER_NAME PYTHON MLFLOW_PORT POSTGRES_PORT S3_PORT S3_TLS_PORT
    MON_PORT S3_STORE S3_SIZE BUCKET)

# options ARGUMENT...: sets the variables above.
options() {
    while [ $# -gt 0 ]; do
        [ $# -ge 2 ] || die "$1: wants a value"
        case $1 in
            --port | --mlflow-port | --postgres-port | --s3-port | --s3-tls-port | --mon-port | --workers | --s3-size)
                [[ $2 =~ ^[1-9][0-9]*$ ]] || die "$1 $2: not a number" ;;&
            *port) [ "$2" -le 65535 ] || die "$1 $2: a port is at most 65535" ;;&
            --port) PORT=$2 ;;
            --mlflow-port) MLFLOW_PORT=$2 ;;
            --postgres-port) POSTGRES_PORT=$2 ;;
            --s3-port) S3_PORT=$2 ;;
            --s3-tls-port) S3_TLS_PORT=$2 ;;
            --mon-port) MON_PORT=$2 ;;
            --workers) WORKERS=$2 ;;
            --s3-size) S3_SIZE=$2 ;;
            --s3-store)
                [[ $2 =~ ^(disk|memory)$ ]] || die "--s3-store $2: disk or memory"
                S3_STORE=$2 ;;
            --address) ADDRESS=$2 ;;
            --name)
                [[ $2 =~ ^[A-Za-z0-9]([A-Za-z0-9.-]*[A-Za-z0-9])?$ ]] || die "--name $2: not a host's name"
                NAME=$2 ;;
            --certificate) CERTIFICATE=$(readable "$2") ;;
            --key) KEY=$(readable "$2") ;;
            --ca) CA=$(readable "$2") ;;
            --user) USER_NAME=$2 ;;
            --python) PYTHON=$2 ;;
            --bucket)
                BUCKET_GIVEN=yes
                [[ $2 =~ ^s3://[a-z0-9][a-z0-9.-]+$ ]] || die "--bucket $2: wants s3://NAME"
                BUCKET=$2 ;;
            *) die "$1: no such option; there are:$OPTIONS" ;;
        esac
        shift 2
    done
    [[ $ADDRESS =~ ^[0-9]+(\.[0-9]+){3}$ ]] || die "--address $ADDRESS: not an IPv4 address"
    [ "$ADDRESS" != 0.0.0.0 ] || [ -n "$NAME" ] || die "--address 0.0.0.0: say with --name what clients call this machine"
    [ -z "$BUCKET" ] || [ -z "$S3_TLS_PORT" ] || die "--s3-tls-port is for the stack's own store: --bucket names another"
    if [ -n "$CERTIFICATE" ]; then
        [ -n "$KEY" ] || die "--certificate wants its --key"
        [ -n "$NAME" ] || die "--certificate wants the --name that it was made for"
    fi
}
readable() { [ -r "$1" ] || die "$1: can't be read"; readlink -f "$1"; }

# arguments USAGE VERB DIR OPTION...: for the scripts that have verbs. Sets VERB, DIR and the settings.
arguments() {
    local usage=$1
    VERB=${2:-}
    [[ $VERB =~ ^(start|stop|status|env)$ ]] && [ -n "${3:-}" ] || die "usage: $usage start|stop|status|env DIR; options of start:$OPTIONS"
    open_dir "$3"
    shift 3
    [ "$VERB" = start ] || [ $# = 0 ] || die "$VERB takes no options: they are kept from the start"
    options "$@"
    choose_user
}

# open_dir DIR: absolute, with its settings read. A folder that isn't a stack's is refused, except for an empty one at the start.
open_dir() {
    DIR=$(realpath -m "$1")
    [[ $DIR =~ ^[A-Za-z0-9/._-]+$ ]] || die "$DIR: the name goes into configuration files: letters, digits and ._- only"
    defaults
    if [ -e "$DIR/settings" ]; then
        [ -r "$DIR/settings" ] || die "$DIR: can't be read by $(id -un): it is another user's"
        # shellcheck disable=SC1091
        . "$DIR/settings"
    elif [ "${VERB:-}" != start ]; then
        die "$DIR: no stack was started here"
    elif [ -d "$DIR" ] && [ -n "$(ls -A "$DIR")" ]; then
        die "$DIR: is not empty, and nothing of a stack's: name another folder"
    fi
}

# make_dir: the folders, and the settings as they now are.
make_dir() {
    mkdir -p "$DIR" && chmod 711 "$DIR"
    mkdir -p "$DIR"/{secrets,run,log,tmp,tls,backups} && chmod 755 "$DIR/tls"
    local name
    for name in "${SETTINGS[@]}"; do printf '%s=%q\n' "$name" "${!name}"; done >"$DIR/settings.new"
    if [ -f "$DIR/settings" ] && ! cmp -s "$DIR/settings" "$DIR/settings.new"; then
        for name in "${DAEMONS[@]}"; do
            ! alive "$name" || die "$DIR is running with other options: stop it before you change them"
        done
    fi
    mv "$DIR/settings.new" "$DIR/settings"
    give "$DIR" "$DIR"/{settings,secrets,run,log,tmp,tls,backups}
    "${AS[@]}" test -x "$DIR" || die "$DIR: user $USER_NAME can't come there: choose a folder that it can enter, or another --user"
}

# ---- the S3 store ---------------------------------------------------------------------------------------------------

AWS_NAMES=(AWS_ENDPOINT_URL AWS_ENDPOINT_URL_S3 AWS_ACCESS_KEY_ID AWS_SECRET_ACCESS_KEY AWS_SESSION_TOKEN AWS_REGION
    AWS_DEFAULT_REGION AWS_CA_BUNDLE AWS_REQUEST_CHECKSUM_CALCULATION AWS_RESPONSE_CHECKSUM_VALIDATION)

# keep_s3: with --bucket, how the environment says that it is reached.
keep_s3() {
    local name
    [ "$BUCKET_GIVEN" = yes ] || return 0
    for name in "${AWS_NAMES[@]}"; do
        [ -z "${!name:-}" ] || export_line "$name" "${!name}"
    done >"$DIR/secrets/s3.env"
    give "$DIR/secrets/s3.env"
}

# s3_env: prints the exports by which the S3 store is reached from this machine.
s3_env() {
    if [ -n "$BUCKET" ]; then
        cat "$DIR/secrets/s3.env"
        export_line MMDISTILL_BUCKET "$BUCKET"
    else
        "$INFRA/objectstore/ceph.sh" env "$DIR"
    fi
}

# ---- users ---------------------------------------------------------------------------------------------------------
# Root gives the services away to an ordinary user: PostgreSQL refuses root. AS: what runs a command as that user.

choose_user() {
    if [ "$(id -u)" != 0 ]; then
        [ -z "$USER_NAME" ] || [ "$USER_NAME" = "$(id -un)" ] || die "only root can run the services as --user $USER_NAME"
        AS=(env)
        return
    fi
    USER_NAME=${USER_NAME:-postgres}
    id "$USER_NAME" >/dev/null 2>&1 || die "there is no user $USER_NAME: install Debian's package postgresql, or name one with --user"
    [ "$(id -u "$USER_NAME")" != 0 ] || die "--user $USER_NAME: PostgreSQL doesn't run as root"
    AS=(setpriv "--reuid=$(id -u "$USER_NAME")" "--regid=$(id -g "$USER_NAME")" --init-groups --no-new-privs env)
}
give() { [ "$(id -u)" != 0 ] || chown "$USER_NAME:" "$@"; }

# secret FILE: makes 192 random bits, if the file isn't there.
secret() {
    if [ ! -s "$1" ]; then
        openssl rand -hex 24 >"$1.new"
        mv "$1.new" "$1"
    fi
    give "$1"
}

# ---- what has to be there ------------------------------------------------------------------------------------------

# Where programs are looked for beyond PATH: Debian's PostgreSQL isn't in it, nor /usr/sbin for ordinary users.
TOOL_PATH=${MMDISTILL_TOOL_PATH-/usr/sbin:/sbin:$(printf '%s\n' /usr/lib/postgresql/*/bin | sort -V | tail -n 1)}
[ -z "$TOOL_PATH" ] || PATH=$PATH:$TOOL_PATH

# need PROGRAM:PACKAGE...: one line that names all that is missing.
need() {
    local pair programs='' packages=''
    for pair in "$@"; do
        if ! command -v "${pair%%:*}" >/dev/null; then
            programs+=" ${pair%%:*}"
            [[ " $packages " == *" ${pair##*:} "* ]] || packages+=" ${pair##*:}"
        fi
    done
    [ -z "$programs" ] || die "not found:${programs}; apt-get install -y --no-install-recommends${packages}"
}

# choose_python MODULE...: PY is one that has them all; AS_PY runs it: as root where the services' user can't read it.
choose_python() {
    local check='import importlib.util as u, sys; sys.exit(" ".join(m for m in sys.argv[1:] if u.find_spec(m) is None) or None)'
    local install="pip install 'mmdistill[server]' in it, or name another with --python" missing
    PY=$PYTHON
    [ -n "$PY" ] || PY=$(dirname "$INFRA")/.venv/bin/python
    [ -n "$PYTHON" ] || [ -x "$PY" ] || PY=$(command -v python3 || true)
    [ -n "$PY" ] && [ -x "$PY" ] || die "no Python${PY:+ at $PY}: $install"
    missing=$(cd / && "$PY" -c "$check" "$@" 2>&1) || die "$PY lacks ${missing##*$'\n'}: $install"
    AS_PY=("${AS[@]}")
    if ! (cd / && "${AS[@]}" "$PY" -c "$check" "$@" >/dev/null 2>&1); then
        AS_PY=(env)
        AS_ROOT=", as root: user $USER_NAME can't run $PY"
    fi
}
AS_ROOT=''

listening() { (exec 3<>"/dev/tcp/${2:-127.0.0.1}/$1") 2>/dev/null; }

# port_free OPTION PORT [ADDRESS]
port_free() {
    local address=${3:-127.0.0.1}
    [ "$address" != 0.0.0.0 ] || address=127.0.0.1
    ! listening "$2" "$address" || die "port $2 of $address is taken by another program: choose another with $1"
}

# ---- one at a time -------------------------------------------------------------------------------------------------

# Descriptor 9 is the lock; everything that outlives the script is started without it.
lock() {
    exec 9>"$DIR/run/$1.lock"
    flock -w 120 9 || die "another start or stop of $DIR is still running"
}

# ---- daemons -------------------------------------------------------------------------------------------------------
# DIR/run/NAME.pid holds the process's id, its start time and the boot's id, so that no later process is taken for it.

STARTED=()
ENVIRONMENT=''
SETTLED=yes

started_at() { local stat; stat=$(cat "/proc/$1/stat" 2>/dev/null) || return 1; stat=${stat##*) }; set -- $stat; echo "${20}"; }
booted() { cat /proc/sys/kernel/random/boot_id; }

# pid_of NAME: prints the id of the daemon's first process if that runs.
pid_of() {
    local pid at boot
    { read -r pid at boot <"$DIR/run/$1.pid"; } 2>/dev/null && [ "$boot" = "$(booted)" ] && [ "$(started_at "$pid")" = "$at" ] || return 1
    [ "$(awk '/^State:/ { print $2 }' "/proc/$pid/status" 2>/dev/null || echo Z)" != Z ] && echo "$pid"
}
alive() { pid_of "$1" >/dev/null; }

# group_of NAME: prints the id of its process group while any of it runs, be it that the first process has ended.
group_of() {
    local pid at boot
    ! pid_of "$1" || return 0
    { read -r pid at boot <"$DIR/run/$1.pid"; } 2>/dev/null && [ "$boot" = "$(booted)" ] || return 1
    [ ! -d "/proc/$pid" ] || [ "$(started_at "$pid")" = "$at" ] || return 1
    { cat /proc/[0-9]*/stat 2>/dev/null || true; } | awk -v group="$pid" '{ sub(/.*\) /, "") } $3 == group && $1 != "Z" { found = 1 } END { exit !found }' || return 1
    echo "$pid"
}

# make_way NAME OPTION PORT [ADDRESS]: unless it runs, what is left of it is ended, and its port has to be free.
make_way() { alive "$1" || { halt "$1" && port_free "${@:2}"; }; }

# daemon NAME COMMAND...: in the background and in a session of its own, its output in DIR/log/NAME.log (and .1: what was
# there at a start, beyond 16 MiB). ENVIRONMENT names a file with what it shall find in its environment: secrets never stand in a command line, which all users can read.
daemon() {
    local name=$1 log=$DIR/log/$1.log pid
    shift
    [ "$(stat -c %s "$log" 2>/dev/null || echo 0)" -lt 16777216 ] || mv "$log" "$log.1"
    touch "$log"
    give "$log"
    (
        # shellcheck disable=SC1090
        [ -z "$ENVIRONMENT" ] || . "$ENVIRONMENT"
        cd "$DIR/tmp" && exec setsid "$@"
    ) >>"$log" 2>&1 </dev/null 9>&- &
    pid=$!
    echo "$pid $(started_at "$pid") $(booted)" >"$DIR/run/$name.pid"
    STARTED=("$name" "${STARTED[@]}")
}

# wait_for NAME SECONDS PROBE...: until the probe succeeds; ends at once if the daemon does.
wait_for() {
    local name=$1 until=$((SECONDS + $2))
    shift 2
    until "$@" >/dev/null 2>&1; do
        alive "$name" || die "$name ended while it started: see $DIR/log/$name.log"
        [ $SECONDS -lt $until ] || die "$name doesn't answer: see $DIR/log/$name.log"
        sleep 0.2
    done
}

# halt NAME [SIGNAL [group]]: asks the first process, or all of them, waits for 30 s until all are gone, then kills.
halt() {
    local pid to i
    if pid=$(group_of "$1"); then
        to=$pid
        [ "${3:-}" = '' ] && alive "$1" || to=-$pid
        kill -s "${2:-TERM}" -- "$to" 2>/dev/null || true
        for ((i = 0; i < 150; i++)); do group_of "$1" >/dev/null || break; sleep 0.2; done
        kill -s KILL -- "-$pid" 2>/dev/null || true
        say "$1: stopped"
    fi
    rm -f "$DIR/run/$1.pid"
}

# unless_settled STOP: when the script ends before `settled`, STOP NAME is called for each daemon it started, the newest first.
unless_settled() {
    SETTLED=no
    # shellcheck disable=SC2064
    trap "undo $1" EXIT
    trap 'exit 130' INT
    trap 'exit 143' TERM
}
undo() {
    local code=$? name
    [ "$SETTLED" = no ] && [ $code != 0 ] || return 0
    set +e
    for name in "${STARTED[@]}"; do "$1" "$name" >&2; done
    exit $code
}
settled() { SETTLED=yes; }

# state NAME ADDRESS: a line of status; 1 if it isn't up.
state() {
    local pid
    if pid=$(pid_of "$1"); then
        printf '%-9s up    %-22s process %s\n' "$1" "$2" "$pid"
    else
        printf '%-9s down  %-22s log %s\n' "$1" "$2" "$DIR/log/$1.log"
        return 1
    fi
}

# export_line NAME VALUE
export_line() { printf 'export %s=%q\n' "$1" "$2"; }
