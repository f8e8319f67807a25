#!/bin/sh
# Installs the named packages of Debian, where there are apt-get and root; elsewhere the tests that need them skip by name.
set -eu
missing=""
for package in "$@"; do
    dpkg-query --show --showformat '${Status}' "$package" 2>/dev/null | grep -q 'ok installed' || missing="$missing $package"
done
[ -n "$missing" ] || exit 0
if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
    echo "not installed, and not to be installed without apt-get and root:$missing"
    exit 0
fi
export DEBIAN_FRONTEND=noninteractive
exec 9>/tmp/globallocal-install.lock && flock 9 # two make targets at once
dpkg --configure -a # an installation that was cut off earlier
# shellcheck disable=SC2086
apt-get update -qq && apt-get install --yes --quiet --no-install-recommends $missing || echo "not installed:$missing"
