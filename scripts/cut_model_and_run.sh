#!/usr/bin/env bash
# Cut a model for several cards, as the document qwen_7b_atb_pytorch does.
#   bash scripts/cut_model_and_run.sh [inference|precision|performance] [--input_dir D] [--output_dir D] [--world_size N]
#     [--config config.ini] [setting=value ...]
# The first call cuts into output_dir/<rank>/; a later one finds the parts there and checks that they are of these weights
# and this cut. With a task, main.py then runs over the parts, a card for each. MAX_SEQ_LEN and TIMEIT count.
# Edit these lines, or give the same names in the environment or as arguments.
set -euo pipefail

input_dir=${input_dir:-}                            # Hugging Face folder of the model
output_dir=${output_dir:-}                          # of the parts; empty: part_model in input_dir
world_size=${world_size:-${rank_size:-2}}           # cards
recut=${recut:-0}                                   # 1: replace parts of other weights or of another cut
allow_pickle=${allow_pickle:-0}                     # 1: read .bin weights, if you trust their source

usage() {
  sed -n '2,7s/^# \{0,1\}//p' "$0"
}
fail() {
  printf 'error: %s\n  try: %s\n' "$1" "$2" >&2
  exit 2
}

task=
settings=()
while [ $# -gt 0 ]; do
  case $1 in
    -h | --help)
      usage
      exit 0
      ;;
    --input_dir | --output_dir | --world_size | --rank_size)
      [ $# -ge 2 ] || fail "$1 needs a value" "$1 VALUE"
      name=${1#--}
      printf -v "${name/rank_size/world_size}" '%s' "$2"
      shift 2
      ;;
    --input_dir=* | --output_dir=* | --world_size=* | --rank_size=*)
      name=${1%%=*}
      name=${name#--}
      printf -v "${name/rank_size/world_size}" '%s' "${1#*=}"
      shift
      ;;
    inference | precision | performance)
      [ -z "$task" ] || fail "two tasks: $task and $1" "one of inference, precision, performance"
      task=$1
      shift
      ;;
    --config)
      [ $# -ge 2 ] || fail "$1 needs a value" "$1 config.ini"
      settings+=("$1" "$2")
      shift 2
      ;;
    [a-z]*=*)
      settings+=("$1")
      shift
      ;;
    *) fail "$1 is neither a task nor a flag of this script" "inference, precision or performance; bash $0 --help" ;;
  esac
done

[ -n "$input_dir" ] || fail "input_dir is not set" "edit it in $0, or: input_dir=/path/to/model bash $0"
[[ $world_size =~ ^[1-9][0-9]*$ ]] || fail "world_size=$world_size is no number of cards" "world_size=2"
output_dir=${output_dir:-$input_dir/part_model}

repo=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PY:-$repo/.venv/bin/python}
[ -x "$python" ] || python=$(command -v python3) || fail "no Python found" "make setup"

words=("$python" "$repo/tools/cut_model_util.py" --input_path "$input_dir" --output_path "$output_dir" --world_size "$world_size")
[ "$recut" != 1 ] || words+=(--recut)
[ "$allow_pickle" != 1 ] || words+=(--allow_pickle)

{ printf '+'; printf ' %q' "${words[@]}"; printf '\n'; } >&2
"${words[@]}"

if [ -n "$task" ]; then
  words=("$python" "$repo/scripts/main.py" --task "$task" --model_path "$input_dir" --part_model "$output_dir")
  words+=("parallel.cards=$world_size" ${settings[@]+"${settings[@]}"})
  { printf '+'; printf ' %q' "${words[@]}"; printf '\n'; } >&2
  exec "${words[@]}"
fi
echo "next: bash $0 inference|precision|performance   # over these parts"
echo "      make predict WEIGHTS=$input_dir PROMPT='...'   # the whole model on one device"
echo "      make merge-shards WEIGHTS=$output_dir OUTPUT=<folder>   # one Hugging Face folder of the parts"
