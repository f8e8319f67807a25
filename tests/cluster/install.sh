#!/bin/sh
# Debian's packages that the tests of this folder need, where there are apt-get and root; elsewhere they skip by name.
set -eu
missing=""
for package in iproute2 openssh-server openssh-client pdsh slurm-wlm munge util-linux; do
    dpkg-query --show --showformat '${Status}' "$package" 2>/dev/null | grep -q 'ok installed' || missing="$missing $package"
done
[ -n "$missing" ] || exit 0
if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
    echo "not installed, and not to be installed without apt-get and root:$missing"
    exit 0
fi
export DEBIAN_FRONTEND=noninteractive
dpkg --configure -a # an installation that was cut off earlier
apt-get update -qq
# shellcheck disable=SC2086
apt-get install --yes --quiet --no-install-recommends $missing
