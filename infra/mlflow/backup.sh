#!/usr/bin/env bash
# A backup of a server that runs: both databases, and every artifact.
#   backup.sh DIR OUT [--listing]     --listing: the artifacts' names, sizes and hashes alone, where the bucket has copies of its own
# OUT is a new folder: there whole, read back and checked, or not at all. The databases come first: what they name was stored
# before. It holds the accounts' password hashes and no other secret.
HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
. "$HERE/../lib.sh"
. "$HERE/parts.sh"
VERB=backup
[ $# = 2 ] || { [ $# = 3 ] && [ "$3" = --listing ]; } || die "usage: backup.sh DIR OUT [--listing]"
open_dir "$1"
choose_user
need_parts
need sha256sum:coreutils
choose_python mlflow psycopg2 boto3
out=$(realpath -m "$2")
[ ! -e "$out" ] || die "$out: is there already; name another folder"
alive postgres || die "$DIR: PostgreSQL doesn't run: serve.sh start $DIR (or stack.sh)"

mkdir -p "$(dirname "$out")"
part=$(mktemp -d "$out.part-XXXXXX")
trap 'rm -rf "$part"' EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

for name in "${DATABASES[@]}"; do dump "$name" "$part/$name.dump"; done
how=save
[ "${3:-}" != --listing ] || how=list
said=$(reader objects.py $how "$part") || die "the artifacts could not be read${said:+: $said}; see $DIR/log/mlflow-tools.log"
{
    echo "made     $(date -u +%Y-%m-%dT%H:%M:%SZ)"
    echo "mlflow   $("$PY" -c 'import importlib.metadata as m; print(m.version("mlflow"))')"
    echo "postgres $(cat "$DIR/postgres/data/PG_VERSION")"
    echo "objects  $said$([ $how = save ] || echo ', listed only')"
} >"$part/about.txt"
(cd "$part" && sha256sum mlflow.dump mlflow_auth.dump objects.jsonl about.txt >SHA256SUMS && sha256sum --check --quiet SHA256SUMS) ||
    die "what was written can't be read back: is the disk full?"
if [ $how = save ]; then
    said=$(reader objects.py verify "$part") || die "what was written can't be read back: $said"
fi
sync "$part"/*
mv -T "$part" "$out"
trap - EXIT
say "backup: $out, $(sed -n 's/^objects *//p' "$out/about.txt"), $(du -sh "$out" | cut -f 1)"
