#!/usr/bin/env bash
# Run this line: init, register one model per task, merge them once, status, export.
#
#   MODELS=/models bash examples/llm/run.sh
#
# MODELS is a folder with one finetuned model per task (sst2, gsm8k). BASE and DATA replace the
# hub ids of the files by local folders; DATA has one folder of rows per task. State and the merged
# model go to WORK.
set -euo pipefail

models=${MODELS:?set MODELS to a folder with one finetuned model per task}
here=$(cd "$(dirname "$0")" && pwd)
work=${WORK:-$here/work}
mkdir -p "$work/tasks"
export RESTITCH_HOME="$work/.restitch"

for file in "$here"/tasks/*.yaml; do
  task=$(basename "$file" .yaml)
  sed "${DATA:+s|^  path: .*|  path: $DATA/$task|}" "$file" > "$work/tasks/$task.yaml"
done
sed "${BASE:+s|^base: .*|base: $BASE|}" "$here/line.yaml" > "$work/line.yaml"
restitch init "$work/line.yaml"    # it reads lambada.yaml, too: the general benchmark
for task in gsm8k sst2; do
  restitch register llm --task "$work/tasks/$task.yaml" --model "$models/$task" --no-remerge
done
# Exit code 5: a gate held a model. The line goes on with the others.
restitch remerge llm || [ $? -eq 5 ]
restitch status llm
restitch export llm champion "$work/merged" --overwrite
