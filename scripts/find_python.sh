#!/bin/sh
# Print the Python interpreter that `make` uses, by its path. One sentence on stderr and exit code 2 where there is none.
#
#   find_python.sh [INTERPRETER [MINOR]]
#
# INTERPRETER is the only candidate where it is given and not empty; otherwise the candidates are python3, then the
# versions of setup.py's python_requires from the newest down, on the PATH and then in pyenv's folder. MINOR (13 for
# 3.13) narrows the range to one version. A suitable interpreter is CPython with the modules venv and ensurepip.
set -u
setup="$(dirname "$0")/../setup.py"
bounds=$(sed -n 's/^ *python_requires=">=3\.\([0-9]*\),<3\.\([0-9]*\)".*/\1 \2/p' "$setup")
first=${bounds% *}
end=${bounds#* }
wanted=${1:-}
if [ -n "${2:-}" ]; then first=$2 end=$(($2 + 1)); fi
last=$((end - 1))
if [ "$first" = "$last" ]; then range="3.$first"; else range="3.$first to 3.$last"; fi

probe='
import sys
kind = "ok"
try:
    import ensurepip, venv
except ImportError:
    kind = "novenv"
if getattr(getattr(sys, "implementation", None), "name", "cpython") != "cpython":
    kind = "notcpython"
if "t" in getattr(sys, "abiflags", ""):
    kind = "freethreaded"
print("%d %d %d %s" % (sys.version_info[0], sys.version_info[1], sys.version_info[2], kind))
'

fail() {
    echo "error: $1" >&2
    exit 2
}

# look CANDIDATE: sets version, minor (0 for another major version) and kind; fails where it does not run.
look() {
    path=$(command -v "$1" 2>/dev/null) || return 1
    answer=$("$path" -c "$probe" 2>/dev/null </dev/null) || return 1
    # shellcheck disable=SC2086
    set -- $answer
    [ $# = 4 ] || return 1
    version=$1.$2.$3 minor=$2 kind=$4
    [ "$1" = 3 ] || minor=0
}

suitable() { [ "$minor" -ge "$first" ] && [ "$minor" -le "$last" ] && [ "$kind" = ok ]; }

# why: what is wrong with the interpreter looked at, as the end of "X is ...".
why() {
    if [ "$minor" -lt "$first" ] || [ "$minor" -gt "$last" ]; then
        echo "Python $version"
    elif [ "$kind" = novenv ]; then
        echo "Python $version without the modules venv and ensurepip"
    elif [ "$kind" = freethreaded ]; then
        echo "the free-threaded build of Python $version"
    else
        echo "Python $version, which is not CPython"
    fi
}

if [ -n "$wanted" ]; then
    look "$wanted" || fail "PYTHON=$wanted is no Python that runs: give the path of Python $range, or leave PYTHON= out."
    if suitable; then
        echo "$path"
        exit 0
    fi
    [ "$minor" -le "$last" ] ||
        fail "PYTHON=$wanted is Python $version; Python 3.$minor is not tested yet: use $range."
    [ "$minor" -lt "$first" ] || [ "$kind" != novenv ] ||
        fail "PYTHON=$wanted is $(why): install them (Debian, Ubuntu: apt-get install python3.$minor-venv)."
    fail "PYTHON=$wanted is $(why): use $range."
fi

set -- python3
number=$last
while [ "$number" -ge "$first" ]; do
    set -- "$@" "python3.$number"
    number=$((number - 1))
done
pyenv=${PYENV_ROOT:-${HOME:-/}/.pyenv}
number=$last
while [ "$number" -ge "$first" ]; do
    for path in "$pyenv/versions/3.$number".*/bin/python3; do
        if [ -x "$path" ]; then set -- "$@" "$path"; fi
    done
    number=$((number - 1))
done
# The last two are never suitable: they are named where nothing else is found.
found="" untested="" novenv=""
for candidate in "$@" "python3.$end" "python3.$((first - 1))"; do
    look "$candidate" || continue
    if suitable; then
        echo "$path"
        exit 0
    fi
    case "$found" in *"$(why)"*) continue ;; esac
    found="$found${found:+, }$candidate is $(why)"
    [ "$minor" -le "$last" ] || untested=$minor
    if [ "$kind" = novenv ] && [ "$minor" -ge "$first" ] && [ "$minor" -le "$last" ]; then novenv=$minor; fi
done
[ -z "$novenv" ] || fail "$found: install them (Debian, Ubuntu: apt-get install python3.$novenv-venv)."
install="install Python 3.$last (python.org, or the system's package manager) or name one with PYTHON="
[ -z "$untested" ] || fail "Python 3.$untested is not tested yet: use $range ($found; $install)."
fail "there is no Python $range here (${found:-no python3 is on the PATH}): $install."
