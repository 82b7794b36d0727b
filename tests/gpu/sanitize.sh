#!/usr/bin/env bash
# compute-sanitizer over small GPU tests, one summary line a tool; exit code 1 if a tool or a test found anything.
#   memcheck   tests marked `sanitize`, without torch's memory pool, which would hide overruns from one tensor into the next
#   synccheck  the same
#   racecheck  tests marked `racecheck`
# usage: tests/gpu/sanitize.sh [memcheck] [synccheck] [racecheck]      default: all. Logs stay in $LOGS (default: a new folder in /tmp).
#   SANITIZER=compute-sanitizer   PYTHON=python3
set -uo pipefail
cd "$(dirname "$0")/../.."
SANITIZER=${SANITIZER:-compute-sanitizer} PYTHON=${PYTHON:-python3} LOGS=${LOGS:-$(mktemp -d)}
command -v "$SANITIZER" >/dev/null || { echo "sanitize: $SANITIZER is not on PATH; it is part of the CUDA toolkit" >&2; exit 2; }
[ $# -gt 0 ] || set -- memcheck synccheck racecheck
mkdir -p "$LOGS"
# our kernels alone: torch's, which make the inputs and the reference, run at full speed
kernels=(--kernel-name kns=attention_ --kernel-name kns=append_b16 --kernel-name kns=rope_append_ --kernel-name kns=merge_states_
  --kernel-name kns=gemv_ --kernel-name kns=page_ --kernel-name kns=select_pages)
status=0
for tool in "$@"; do
  case "$tool" in
    memcheck | synccheck) marker=sanitize clean='ERROR SUMMARY: 0 errors' ;;
    racecheck) marker=racecheck clean='RACECHECK SUMMARY: 0 hazards' ;;
    *) echo "sanitize: no such tool: $tool (memcheck, synccheck, racecheck)" >&2; exit 2 ;;
  esac
  log="$LOGS/$tool.log" tests="$LOGS/$tool.tests.log"
  rm -f "$log"
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 "$SANITIZER" --tool "$tool" --error-exitcode 9 "${kernels[@]}" --log-file "$log" \
    "$PYTHON" -m pytest tests/gpu/test_gpu_*.py --device cuda -m "$marker" -p no:cacheprovider \
    >"$tests" 2>&1
  code=$?
  found=$(grep -h 'SUMMARY:' "$log" 2>/dev/null | tail -1 | sed 's/^=* *//')
  echo "$tool: $(tail -1 "$tests"); ${found:-no summary, see $log}"
  if [ "$code" -ne 0 ] || ! grep -q "$clean" "$log" 2>/dev/null; then
    status=1
    echo "$tool: exit code $code; $log, $tests" >&2
    grep -m 20 '^=========' "$log" >&2 || tail -20 "$tests" >&2
  fi
done
exit $status
