#!/bin/sh
# Make or complete the environment that scripts/install.py is told of: with its own Python where that runs, else with one
# that scripts/find_python.sh finds.
#
#   install.sh INTERPRETER --venv FOLDER [OPTION...]
#
# INTERPRETER may be empty.
set -u
here=$(dirname "$0")
wanted=$1 folder=$3
shift
if [ -x "$folder/bin/python" ] && "$folder/bin/python" -c "" 2>/dev/null; then
    "$folder/bin/python" "$here/install.py" "$@" ${wanted:+--chosen "$wanted"} --ready
    code=$?
    [ $code = 1 ] || exit $code
    # The interpreter that it was made from need not be on the PATH.
    [ -n "$wanted" ] || exec "$folder/bin/python" "$here/install.py" "$@"
fi
python=$(sh "$here/find_python.sh" "$wanted") || exit 2
exec "$python" "$here/install.py" "$@" ${wanted:+--chosen "$wanted"}
