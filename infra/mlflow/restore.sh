#!/usr/bin/env bash
# What backup.sh wrote, into a server that runs: the same one, or a new one on another machine.
#   restore.sh DIR IN [--replace]     --replace: although DIR has runs already; its databases are kept in DIR/backups
# The databases are restored beside those in use and take their place at the end: a restore that fails changes nothing.
# Accounts come back with their passwords, except the administrator's, which stays this server's.
HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
. "$HERE/../lib.sh"
. "$HERE/tls.sh"
. "$HERE/parts.sh"
VERB=restore
[ $# = 2 ] || { [ $# = 3 ] && [ "$3" = --replace ]; } || die "usage: restore.sh DIR IN [--replace]"
open_dir "$1"
choose_user
need_parts
need sha256sum:coreutils
choose_python mlflow psycopg2 boto3
from=$(realpath -m "$2")
[ -f "$from/SHA256SUMS" ] || die "$from: is not a backup of backup.sh's"
(cd "$from" && sha256sum --check --quiet --strict SHA256SUMS) >/dev/null 2>&1 || die "$from: is damaged: its files aren't what SHA256SUMS says"
for name in "${DATABASES[@]}"; do [ -f "$from/$name.dump" ] || die "$from: $name.dump is missing"; done
if [ -d "$from/objects" ]; then
    said=$(reader objects.py verify "$from") || die "$from: is damaged: $said"
fi
alive postgres && alive mlflow || die "$DIR: doesn't run: serve.sh start $DIR (or stack.sh)"
lock restore

read -r runs models <<<"$(python_ database.py counts)" || die "MLflow's database can't be read: see $DIR/log/mlflow-tools.log"
if [ "$runs" != 0 ] || [ "$models" != 0 ]; then
    [ "${3:-}" = --replace ] || die "$DIR has $runs runs and $models registered models: --replace puts the backup in their place"
fi

# drop SUFFIX
drop() { for name in "${DATABASES[@]}"; do sql -c "DROP DATABASE IF EXISTS $name$1 WITH (FORCE)" 2>>"$DIR/log/postgres-tools.log" || true; done; }
unfinished() { drop _new; alive mlflow || "$HERE/serve.sh" start "$DIR" >&2 || true; }
trap unfinished EXIT
trap 'exit 130' INT
trap 'exit 143' TERM
drop _new
drop _old
for name in "${DATABASES[@]}"; do
    sql -c "CREATE DATABASE ${name}_new OWNER mlflow"
    pg pg_restore --dbname="${name}_new" --exit-on-error --single-transaction --no-owner --role=mlflow <"$from/$name.dump" \
        >>"$DIR/log/postgres-tools.log" 2>&1 || die "$name.dump could not be restored: see $DIR/log/postgres-tools.log; nothing was changed"
done
states=$(python_ database.py state _new) || die "MLflow can't read the backup: see $DIR/log/mlflow-tools.log; nothing was changed"
[[ $states != *newer* ]] || die "$from was written by a newer MLflow than $PY has; nothing was changed"
say "restore: the databases are read"
if [ -d "$from/objects" ]; then
    said=$(reader objects.py load "$from") || die "the artifacts could not be stored${said:+: $said}; see $DIR/log/mlflow-tools.log"
    say "restore: $said are stored"
fi
(
    lock mlflow
    halt_part mlflow
    [ "${3:-}" != --replace ] || say "restore: what was there before is kept in $(keep_dumps before-restore)"
    {
        echo 'BEGIN;'
        for name in "${DATABASES[@]}"; do echo "ALTER DATABASE $name RENAME TO ${name}_old; ALTER DATABASE ${name}_new RENAME TO $name;"; done
        echo 'COMMIT;'
    } | sql || die "the restored databases could not take their place: see $DIR/log/postgres.log"
)
python_ database.py admin admin 3<"$DIR/secrets/mlflow-admin" ||
    die "the administrator's password could not be set: see $DIR/log/mlflow-tools.log"
"$HERE/serve.sh" start "$DIR"
drop _old
trap - EXIT
say "restore: done, $(sed -n 's/^made *//p' "$from/about.txt")"
