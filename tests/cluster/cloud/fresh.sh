# fresh FOLDER: from now on empty and this namespace's own, but for what the tests themselves need of it.
fresh() {
    mount --rbind "$1" /mnt
    mount -t tmpfs -o mode="$(stat -c %a "$1")" tmpfs "$1"
    local kept
    for kept in "${KEEP[@]}"; do
        if [[ $kept/ == "$1"/* ]]; then
            mkdir -p "$kept"
            mount --rbind "/mnt${kept#"$1"}" "$kept"
        fi
    done
    umount --lazy /mnt
}
