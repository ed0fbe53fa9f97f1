#!/usr/bin/env bash
# Prompts through the paged engine, as MindIE's run_pa.sh takes them:
#   bash scripts/run_pa.sh -m WEIGHTS [-c [true]] [-t TEMPLATE] [-e [true]] [-r [true]] [flags of examples/run_pa.py ...]
#   -m --model-path  -c --is-chat-model  -t --chat_template  -e --is_embedding_model  -r --trust_remote_code
# Edit these lines, or give the same names in the environment.
set -euo pipefail

export BIND_CPU=${BIND_CPU:-1}                       # 1: each rank keeps to its part of the host's cores
export RESERVED_MEMORY_GB=${RESERVED_MEMORY_GB:-}    # GB of free memory that the cache leaves alone; empty: engine.memory_fraction
visible_devices=${ASCEND_RT_VISIBLE_DEVICES:-}       # 0,1,...: as many ranks as there are; empty: one, on any device

repo=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
fail() {
  printf 'error: %s\n  try: %s\n' "$1" "$2" >&2
  exit 2
}
usage() {
  sed -n '2,5s/^# \{0,1\}//p' "$0"
}

model='' template='' chat=false embedding=false trust=false
others=()
while [ $# -gt 0 ]; do
  name=$1
  case $name in
    -h | --help) usage; exit 0 ;;
    -m | --model-path | --model_path | -t | --chat_template)
      [ $# -ge 2 ] || fail "$name needs a value" "$name VALUE"
      case $name in -m | --model*) model=$2 ;; *) template=$2 ;; esac
      shift 2
      ;;
    -c | --is-chat-model | --is_chat_model | -e | --is_embedding_model | -r | --trust_remote_code)
      value=true
      case ${2:-} in
        true | True | 1) shift ;;
        false | False | 0) value=false; shift ;;
        '' | -* | *=*) ;;
        *) fail "$name is true or false, not $2" "$name true" ;;
      esac
      shift
      case $name in -c | --is?chat*) chat=$value ;; -e | --is_emb*) embedding=$value ;; *) trust=$value ;; esac
      ;;
    *) others+=("$name"); shift ;;
  esac
done
[ -n "$model" ] || fail "which weights?" "bash $0 -m WEIGHTS"

words=(--model_path "$model")
[ "$chat" = false ] || words+=(--is_chat_model)
[ -z "$template" ] || words+=(--chat_template "$template")
[ "$trust" = false ] || words+=(--trust_remote_code)
[ "$embedding" = false ] || words+=(--is_embedding_model --max_output_length 1)
if [ -n "$visible_devices" ]; then # the ranks of one host meet at a free port: there is no MASTER_PORT to choose
  commas=${visible_devices//[^,]/}
  words+=(--tp $((${#commas} + 1)))
fi

python=${PY:-$repo/.venv/bin/python}
[ -x "$python" ] || python=$(command -v python3) || fail "no Python found" "make setup"
words=("$python" "$repo/examples/run_pa.py" "${words[@]}" ${others[@]+"${others[@]}"})
{ printf '+'; printf ' %q' "${words[@]}"; printf '\n'; } >&2
exec "${words[@]}"
