#!/usr/bin/env bash
# Install a wheel into a new environment and use it from an empty folder, far from the clone: make wheel
# All other packages are those of the environment whose Python is given, so no network is needed.
#   scripts/try_wheel.sh .venv/bin/python dist/lightning_diffclf-0.1.0-py3-none-any.whl
set -euo pipefail
python=$1
wheel=$(realpath "$2")

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
packages() { "$1" -c 'import sysconfig; print(sysconfig.get_path("purelib"))'; }

"$python" -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --no-deps --no-index "$wheel"
packages "$python" >"$(packages "$folder/venv/bin/python")/others.pth" # not what is installed there as editable
PATH="$folder/venv/bin:$PATH"
mkdir "$folder/empty"
cd "$folder/empty"

set -x
diffclf configs
diffclf configs --copy dit_digits.yaml --out mine.yaml
diffclf configs --copy slurm/train.sbatch
diffclf configs --copy suites/digits.yaml
diffclf suite digits.yaml --dry-run
diffclf demo --trainer.max_steps 20 --trainer.val_check_interval 20 --checkpoint.every_n_train_steps 20 --classifier.draws 3
test -s runs/dit_digits/evaluation/report.html
diffclf evaluate --config sd_digits.yaml --classifier.draws 2 --trainer.limit_test_batches 1
