#!/usr/bin/env bash
# Turn the Makefile's variables into one command, print it and run it: scripts/task.sh TASK [setting=value ...]
set -euo pipefail
cd "$(dirname "$0")/.."
task=$1
shift

case ${MODEL:-} in
  qwen2_5*) family=qwen2_5 ;;
  qwen2* | gte*) family=qwen2 ;;
  qwen1_5* | codeqwen*) family=qwen1_5 ;;
  qwen_*) family=qwen ;;
  *) family=qwen2_5 ;;
esac

words=("task=$task")
add() { [ -z "$2" ] || words+=("$1=$2"); }
add model "${MODEL:-}"
add data "${DATA:-}"
add weights "${WEIGHTS:-}"
add adapter "${ADAPTER:-}"
add tokenizer "${TOKENIZER:-}"
add run "${RUN:-}"
add output "${OUTPUT:-}"
add prompt "${QWEN_PROMPT:-}"
if [ "$task" = verify ]; then
  add verify.a "${A:-}"
  add verify.b "${B:-}"
  [ "${LOGITS:-0}" = 0 ] || add verify.logits true
fi
[ "$task" != serve ] || add serve.port "${PORT:-}"
add backend "${BACKEND:-}"
add engine.mode "${ENGINE:-}"
add device "${DEVICE:-}"
add parallel.cards "${CARDS:-}"
add parallel.nodes "${NODES:-}"
add parallel.node_rank "${NODE_RANK:-}"
if [ "${NODES:-1}" != 1 ]; then # a cluster's own MASTER_ADDR means something only there
  add parallel.master_addr "${MASTER_ADDR:-}"
  add parallel.master_port "${MASTER_PORT:-}"
fi

command=("${PY:-python}" "research/$family/run_$family.py" "${words[@]}" "$@")
{ printf '+'; printf ' %q' "${command[@]}"; printf '\n'; } >&2
exec "${command[@]}"
