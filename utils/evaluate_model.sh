#!/bin/sh
# utils/evaluate.py from any directory: utils/evaluate_model.sh --model outputs/run/final --max-samples 200
here=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd) || exit 1
exec uv run --project "$here/.." python "$here/evaluate.py" "$@"
