#!/bin/sh
# Starts this bundle on a bare 64-bit Arm Linux with Python 3.11 or newer, such as Raspberry Pi OS.
#
#   ./run.sh                  chat
#   ./run.sh "a question"     one answer; options of `edgekit run` may follow
#
# The first start installs what it needs into a folder of its own: from wheels/ where all of it lies there (edgekit export
# --wheelhouse), else from the network. EDGEKIT_HOME moves that folder, by default ~/.local/share/edgekit.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
home=${EDGEKIT_HOME:-${XDG_DATA_HOME:-$HOME/.local/share}/edgekit}
fail() { echo "run.sh: $1" >&2; exit 5; }

[ "$(uname -m)" = aarch64 ] || fail "this bundle is for 64-bit Arm (aarch64), and this is $(uname -m)"
command -v python3 >/dev/null || fail "python3 is missing: sudo apt install python3-venv"
python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
    fail "Python 3.11 or newer is needed, and this is $(python3 -V): use Raspberry Pi OS 12 (bookworm) or newer"

stamp=$home/installed-$(cksum < "$here/requirements.txt" | tr -d ' ')
if [ ! -e "$stamp" ]; then
    python3 -m venv "$home/venv" || fail "a virtual environment could not be made: sudo apt install python3-venv"
    if [ -e "$here/wheels/complete" ]; then offline=--no-index; else offline=; fi
    # shellcheck disable=SC2086
    "$home/venv/bin/pip" --disable-pip-version-check install --quiet $offline --only-binary=:all: \
        --find-links "$here/wheels" --requirement "$here/requirements.txt" || fail "the installation failed: see above"
    : > "$stamp"
fi

# Fast cores only where there are slow ones beside them: a slow one would hold up the others.
cores=$(for cpu in /sys/devices/system/cpu/cpu[0-9]*; do
    [ -r "$cpu/cpu_capacity" ] && echo "$(cat "$cpu/cpu_capacity") ${cpu##*cpu}"
done 2>/dev/null | sort -rn | awk 'NR == 1 {top = $1} $1 >= 0.8 * top {list = list sep $2; sep = ","} END {print list}')
pin=
if [ -n "$cores" ] && command -v taskset >/dev/null; then pin="taskset -c $cores"; fi

if [ $# -eq 0 ]; then set -- chat "$here"; else question=$1; shift; set -- run "$here" "$question" "$@"; fi
# shellcheck disable=SC2086
exec $pin "$home/venv/bin/edgekit" "$@"
