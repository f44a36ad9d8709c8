# Runs Python with the interpreter of the Ray that runs this job: sh start.sh ARGUMENTS-OF-PYTHON
#
# Ray starts a job by a shell command, in which `python` is whatever PATH of `ray start` holds: none, or one without
# dreamfleet's dependencies if Ray was started as VENV/bin/ray without an activated environment. Ray's own interpreter is
# in the command line of the raylet, which is the parent of this shell's parent, the job's supervisor.
raylet=$(sed 's/^.*) [A-Z] //; s/ .*//' "/proc/$PPID/stat" 2>/dev/null)
python=$(tr '\0' '\n' <"/proc/$raylet/cmdline" 2>/dev/null | sed -n 's/^--python_worker_command=//p' | cut -d ' ' -f 1)
[ -x "$python" ] || python=$(command -v python3 || command -v python)
if [ -z "$python" ]; then
    echo "dreamfleet: this machine has no Python that a job can use: Ray's own was not found, and PATH has none" >&2
    exit 2
fi
exec "$python" "$@"
