#!/usr/bin/env bash
# What every worker of a pod does. The pod's startup script, run at each boot, and called over ssh:
#
#   boot    at each boot: see to the end of its lifetime; if there is a job, install and go on with it
#   setup   install the wheel that lies in the bucket
#   run     start the job that lies in the bucket, detached
#   job     the job itself: wait for the other workers, run, keep the log and the exit code in the bucket
#   expire  the end of its lifetime: delete the pod
#
# All that it knows of its pod comes from the metadata that `tpu/pod create` gave it.
set -euo pipefail

ROOT=${DERTA_ROOT:-/opt/derta}
PAUSE=${DERTA_PAUSE:-30}
export HOME=${HOME:-/root}

attribute() {
  curl --silent --fail --header 'Metadata-Flavor: Google' \
    "http://metadata.google.internal/computeMetadata/v1/instance/attributes/$1"
}

say() { echo "$(date -u +%H:%M:%S) $HOST: $*"; }

# One of several workers' objects in the bucket, of this incarnation of the pod.
of_attempt() { echo "$JOB/$1/$ATTEMPT"; }

upload() { gcloud storage cp --no-user-output-enabled "$@"; }

# A text as an object. Nobody would know that a job has ended if this failed.
put() {
  for _ in 1 2 3 4 5; do
    echo "$1" | upload - "$2" && return
    sleep "$PAUSE"
  done
  return 1
}

know_the_pod() {
  URL=$(attribute derta-url)
  ATTEMPT=$(attribute derta-attempt)
  local slice workers
  slice=$(attribute tpu-env | sed -n "s/^MEGASCALE_SLICE_ID: *'\{0,1\}\([0-9]*\).*/\1/p")
  workers=$(attribute worker-network-endpoints | tr ',' '\n' | grep -c .)
  HOST=s${slice:-0}-w$(attribute agent-worker-number)
  HOSTS=$((workers * $(attribute derta-slices)))
}

know_the_job() {
  JOB="$URL/jobs/$(gcloud storage cat "$URL/current")"
}

keep_this_script() {
  mkdir -p "$ROOT/work"
  attribute startup-script >"$ROOT/worker.sh.$$"
  chmod +x "$ROOT/worker.sh.$$"
  mv "$ROOT/worker.sh.$$" "$ROOT/worker.sh"
}

delete_pod() {
  gcloud compute tpus queued-resources delete "$(attribute derta-name)" --project "$(attribute derta-project)" \
    --zone "$(attribute derta-zone)" --force --async --quiet
}

boot() {
  [[ -f $ROOT/deadline ]] || echo $(($(date +%s) + $(attribute derta-seconds))) >"$ROOT/deadline"
  local left=$(($(cat "$ROOT/deadline") - $(date +%s)))
  systemd-run --quiet --unit derta-lifetime --on-active "$((left > 0 ? left : 1))s" \
    --setenv "DERTA_ROOT=$ROOT" "$ROOT/worker.sh" expire
  if gcloud storage ls "$URL/current" >/dev/null 2>&1; then
    setup
    run
  fi
}

# Boot and ssh may come at the same time.
setup() {
  exec 9>"$ROOT/setup.lock"
  flock 9
  rm -rf "$ROOT/dist"
  mkdir -p "$ROOT/dist"
  gcloud storage cp --no-user-output-enabled "$URL/dist/*" "$ROOT/dist/"
  local wanted
  wanted=$(cat "$ROOT"/dist/* | sha256sum)
  if [[ $wanted != "$(cat "$ROOT/installed" 2>/dev/null)" ]]; then
    if systemctl is-active --quiet derta-job; then
      say "a job is running; another version cannot be installed beneath it"
      exit 1
    fi
    local wheel
    wheel=$(echo "$ROOT"/dist/*.whl)
    rm -rf "$ROOT/venv"
    python3 -m pip install --quiet --user --upgrade uv
    python3 -m uv venv --quiet --python 3.11 "$ROOT/venv"
    for try in 1 2 3; do
      python3 -m uv pip install --quiet --python "$ROOT/venv/bin/python" --constraint "$ROOT/dist/constraints.txt" \
        "derta-jax[$(attribute derta-extras | tr '+' ',')] @ file://$wheel" && break
      [[ $try -lt 3 ]] || { say "installation failed"; exit 1; }
      sleep "$PAUSE"
    done
    echo "$wanted" >"$ROOT/installed"
  fi
  say "$("$ROOT/venv/bin/derta" --version)"
  exec 9>&-
}

run() {
  know_the_job
  [[ -f $ROOT/installed ]] || { say "nothing is installed: tpu/pod setup"; exit 1; }
  if systemctl is-active --quiet derta-job; then
    say "the job is running"
    return
  fi
  local code
  code=$(gcloud storage cat "$(of_attempt exits)/$HOST" 2>/dev/null || true)
  if [[ -n $code && $code != 75 ]]; then
    say "the job has ended ($code)"
    return
  fi
  [[ -z $code ]] || gcloud storage rm --no-user-output-enabled "$(of_attempt exits)/$HOST"
  # a SIGTERM to all of the unit lets `derta train` save; a preempted machine has 30 s in all
  systemd-run --quiet --collect --unit derta-job --property TimeoutStopSec=600 \
    --setenv "DERTA_ROOT=$ROOT" --setenv "DERTA_PAUSE=$PAUSE" --setenv "HOME=$HOME" "$ROOT/worker.sh" job
  say "started"
}

all_of() {
  local found
  for _ in $(seq "$2"); do
    found=$(gcloud storage ls "$1/*" 2>/dev/null | grep -c . || true)
    [[ $found -lt $HOSTS ]] || return 0
    sleep "$PAUSE"
  done
  return 1
}

job() {
  know_the_job
  local log=$ROOT/job.log code=0 uploader
  : >"$log"
  gcloud storage cat "$JOB/files.tar.gz" | tar -xz -C "$ROOT/work"
  gcloud storage cat "$JOB/job.sh" >"$ROOT/job.sh"
  # installations end at different times; the processes of a job wait only so long for each other
  put ready "$(of_attempt ready)/$HOST"
  all_of "$(of_attempt ready)" 60 || say "not all workers are ready; starting all the same" >>"$log"

  cd "$ROOT/work"
  (while sleep "$PAUSE"; do upload "$log" "$(of_attempt logs)/$HOST.log" || true; done) &
  uploader=$!
  # a signal goes to the job too; this script outlives it, and bash runs a trap only when the job has ended
  trap : TERM INT
  PATH="$ROOT/venv/bin:$PATH" bash "$ROOT/job.sh" >>"$log" 2>&1 || code=$?
  kill "$uploader" 2>/dev/null || true
  upload "$log" "$(of_attempt logs)/$HOST.log" || true
  put "$code" "$(of_attempt exits)/$HOST"
  [[ $HOST != s0-w0 ]] || tear_down
}

# The one who asked for the pod deletes it; should their machine be asleep, the pod does so by itself.
tear_down() {
  all_of "$(of_attempt exits)" 20 || return 0
  local codes
  codes=$(gcloud storage cat "$(of_attempt exits)/*")
  [[ $codes != *75* ]] || return 0
  gcloud storage ls "$JOB/keep" >/dev/null 2>&1 && return 0
  for _ in $(seq 10); do sleep "$PAUSE"; done
  delete_pod
}

expire() {
  put "$HOST" "$URL/expired/$ATTEMPT" || true
  delete_pod
}

main() {
  know_the_pod
  keep_this_script
  case "$1" in
    boot) boot ;;
    setup) setup ;;
    run) run ;;
    job) job ;;
    expire) expire ;;
    *)
      echo "worker.sh boot|setup|run|job|expire" >&2
      exit 2
      ;;
  esac
}

# In one line, and without stdin: over ssh this script itself comes from there.
main "${1:-boot}" </dev/null; exit
