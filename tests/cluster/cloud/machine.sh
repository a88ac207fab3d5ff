# Process 1 of a machine: its network, folders that are its own, and sshd, which lets in the key pair that moto gave out.
set -euo pipefail
address=$1 folder=$2
. "$folder/environment"
. "$(dirname "${BASH_SOURCE[0]}")/fresh.sh"

until ip link show eth0 >/dev/null 2>&1; do sleep 0.02; done
ip link set lo up
ip address add "$address/16" dev eth0
ip link set eth0 up
ip route add default via 10.42.0.1

fresh /tmp
fresh /home
mount -t tmpfs tmpfs /run
mkdir -p /run/sshd /home/ubuntu/.ssh
cp "$folder/authorized_keys" /home/ubuntu/.ssh/
cp /etc/skel/.bashrc /home/ubuntu/
/usr/sbin/sshd -D -e -f "$folder/sshd_config" &
while :; do wait || true; sleep 3600 & done
