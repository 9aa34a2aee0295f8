# Functions of the recipes. A recipe sources this file first:  . "$(dirname "$0")/common.sh"
#
#   bash recipes/NAME.sh          run the recipe; after an interruption, run it again: finished parts are skipped
#   bash recipes/NAME.sh --dry    print its cost and its commands, and run nothing
#
# PYTHON names the interpreter (default: python). SEEDS replaces the seeds of a recipe, such as SEEDS="0 1".
# THREADS is the number of threads of a process (default: 1, as for all published figures unless a page says otherwise).

set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
PYTHON="${PYTHON:-python}"
SEEDS="${SEEDS:-0 1 2}"
export OMP_NUM_THREADS="${THREADS:-1}"
DRY=""
case "${1:-}" in
    "") ;;
    --dry) DRY=1 ;;
    *) echo "$0: found $1, expected --dry or nothing" >&2; exit 2 ;;
esac

# cost TEXT: time and files of the recipe
cost() { echo "# cost: $*"; }

# run COMMAND...: print and run it
run() {
    printf '%s' "$1"
    printf ' %q' "${@:2}"
    echo
    [ -n "$DRY" ] || "$@"
}

# make FILE COMMAND...: run it if FILE is not there
make() {
    local file="$1"
    shift
    if [ -z "$DRY" ] && [ -e "$file" ]; then echo "# finished: $file"; else run "$@"; fi
}

# train RUN_DIR STEPS FLAGS...: train.py, continued if it was interrupted, skipped if its last checkpoint is there
train() {
    local folder="$1" steps="$2"
    shift 2
    if [ -z "$DRY" ] && [ -d "$(printf '%s/checkpoints/step-%06d' "$folder" "$steps")" ]; then
        echo "# finished: $folder"
    else
        run "$PYTHON" train.py "$@" --steps "$steps" --run-dir "$folder" --resume auto
    fi
}

# install: the packages, on a blank machine
install() {
    if [ -z "$DRY" ] && "$PYTHON" -c "import torch, safetensors, matplotlib" 2>/dev/null; then return; fi
    run "$PYTHON" -m pip install -r requirements.txt
}

install
