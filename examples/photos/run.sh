#!/usr/bin/env bash
# Run this line: init, register one model per task, status, export. Reads models and data from the hub.
#
#   bash examples/photos/run.sh
#
# BASE, DATA and MODELS replace the hub ids by local folders; DATA has one folder of rows per task,
# MODELS one model per task. State and the merged model go to WORK.
set -euo pipefail

here=$(cd "$(dirname "$0")" && pwd)
work=${WORK:-$here/work}
mkdir -p "$work/tasks"
export RESTITCH_HOME="$work/.restitch"

sed "${BASE:+s|^base: .*|base: $BASE|}" "$here/line.yaml" > "$work/line.yaml"
restitch init "$work/line.yaml"
for file in "$here"/tasks/*.yaml; do
  task=$(basename "$file" .yaml)
  sed "${DATA:+s|^  path: .*|  path: $DATA/$task|}" "$file" > "$work/tasks/$task.yaml"
  model=${MODELS:+$MODELS/$task}
  # Exit code 5: a gate held this model. The line goes on with the others.
  restitch register photos --task "$work/tasks/$task.yaml" \
    --model "${model:-tanganke/clip-vit-base-patch32_$task}" || [ $? -eq 5 ]
done
restitch status photos
restitch export photos champion "$work/merged" --overwrite
