#!/usr/bin/env bash
# A real Slurm on one machine: munge, MariaDB, slurmdbd, slurmctld and N slurmd, as root, without systemd or cgroups.
#
#   slurm_up.sh install | up | down | wipe | wipe_after PID
#
# `install` says so in one line where it cannot. `up` starts only what is not running, so it also brings a killed node
# back. `wipe` ends all jobs and leaves nothing; `wipe_after` does that when process PID has ended. All state lies under
# $SLURM_ROOT; the sizes of the nodes are pretended; their GPUs are stand-ins (character devices like /dev/null).
set -euo pipefail
ROOT=${SLURM_ROOT:-/var/tmp/slurm-on-one-machine}
N=${SLURM_NODES:-4} CPUS=${SLURM_CPUS:-8} GPUS=${SLURM_GPUS:-8} PORT=${SLURM_PORT:-17000}
RUN=$ROOT/run LOG=$ROOT/log HOST=$(hostname -s)
export SLURM_CONF=$ROOT/etc/slurm.conf
PACKAGES="slurm-wlm slurmdbd munge mariadb-server"

alive() { readlink -e "/proc/$(cat "$1" 2>/dev/null || echo none)/exe" >/dev/null; } # a zombie has no exe
wait_for() {
  for _ in $(seq 600); do "$@" >/dev/null 2>&1 && return 0; sleep 0.2; done
  echo "timed out: $*" >&2
  return 1
}
stop() {
  alive "$1" || return 0
  kill "$(cat "$1")" || true
  for _ in $(seq 100); do alive "$1" || return 0; sleep 0.1; done
}
present() { command -v slurmctld && command -v slurmd && command -v slurmdbd && command -v mariadbd && command -v munged; }

case ${1:-up} in
install)
  present >/dev/null && exit
  if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
    echo "Slurm is not installed: that takes root, and Debian or Ubuntu ($PACKAGES); its tests are skipped" >&2
    exit
  fi
  # The packages' own services must not start: this script starts what it needs.
  if [ ! -e /usr/sbin/policy-rc.d ]; then
    trap 'rm -f /usr/sbin/policy-rc.d' EXIT
    printf '#!/bin/sh\nexit 101\n' >/usr/sbin/policy-rc.d
    chmod +x /usr/sbin/policy-rc.d
  fi
  apt="apt-get -qq -o DPkg::Lock::Timeout=300"
  # shellcheck disable=SC2086 # lists
  said=$($apt update 2>&1 && DEBIAN_FRONTEND=noninteractive $apt install -y --no-install-recommends $PACKAGES 2>&1) ||
    echo "Slurm cannot be installed here, so its tests are skipped; apt-get: $(tail -n 1 <<<"$said")" >&2
  exit
  ;;
wipe_after)
  while [ -d "/proc/$2" ]; do sleep 2; done
  exec "$0" wipe
  ;;
down | wipe)
  if [ "$1" = wipe ] && alive "$RUN/slurmctld.pid"; then
    scancel --user="$(id -un)" || true
    for _ in $(seq 120); do [ -n "$(squeue -h)" ] || break; sleep 0.5; done
  fi
  for file in "$RUN"/slurmd.*.pid "$RUN"/slurmctld.pid "$RUN"/slurmdbd.pid "$RUN"/mysqld.pid "$RUN"/munged.pid; do
    stop "$file"
  done
  [ "$1" = down ] || rm -rf "$ROOT"
  exit
  ;;
esac

present >/dev/null || { echo "Slurm is not installed; run: $0 install" >&2; exit 2; }
mkdir -p "$ROOT"/{etc,run,log,state,dev,mysql,spool,tmp}

# munge, with a key and a socket of its own
[ -s "$ROOT/munge.key" ] || (umask 077 && head -c 1024 /dev/urandom >"$ROOT/munge.key")
alive "$RUN/munged.pid" || munged --force --key-file="$ROOT/munge.key" --socket="$RUN/munge.sock" \
  --pid-file="$RUN/munged.pid" --log-file="$LOG/munged.log" --seed-file="$ROOT/munge.seed"

# sacct needs slurmdbd, which needs MariaDB; that listens on a unix socket only, and removes temporary files of others
# that start beside it, if they are in the same folder
[ -d "$ROOT/mysql/mysql" ] || mariadb-install-db --no-defaults --user=root --datadir="$ROOT/mysql" --tmpdir="$ROOT/tmp" \
  --skip-test-db --auth-root-authentication-method=normal >/dev/null
alive "$RUN/mysqld.pid" || setsid -f mariadbd --no-defaults --user=root --datadir="$ROOT/mysql" \
  --tmpdir="$ROOT/tmp" --socket="$RUN/mysql.sock" --skip-networking --pid-file="$RUN/mysqld.pid" \
  --innodb-buffer-pool-size=64M --innodb-flush-log-at-trx-commit=0 >"$LOG/mysqld.log" 2>&1 </dev/null
wait_for mariadb --no-defaults -S "$RUN/mysql.sock" -u root -e 'create database if not exists slurm_acct_db'

cat >"$ROOT/etc/slurmdbd.conf" <<END
AuthInfo=socket=$RUN/munge.sock
DbdHost=localhost
DbdPort=$((PORT + 2))
SlurmUser=root
StorageType=accounting_storage/mysql
StorageUser=root
StorageLoc=slurm_acct_db
LogFile=$LOG/slurmdbd.log
PidFile=$RUN/slurmdbd.pid
END
chmod 600 "$ROOT/etc/slurmdbd.conf"
# cred_expire is also the wait before a requeued job may start (default 120 s, at least 5).
# Without AccountingStoragePass the clients look for munge's default socket.
# SLURM_CTLD_PARAMS= (empty) makes a cluster that preempts with SIGTERM only.
CTLD_PARAMS=${SLURM_CTLD_PARAMS-preempt_send_user_signal}
cat >"$ROOT/etc/slurm.conf" <<END
ClusterName=sim
SlurmctldHost=$HOST(127.0.0.1)
SlurmctldPort=$PORT
SlurmUser=root
AuthInfo=socket=$RUN/munge.sock,cred_expire=5
StateSaveLocation=$ROOT/state
SlurmdSpoolDir=$ROOT/spool/%n
SlurmctldPidFile=$RUN/slurmctld.pid
SlurmdPidFile=$RUN/slurmd.%n.pid
SlurmctldLogFile=$LOG/slurmctld.log
SlurmdLogFile=$LOG/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/linux
AccountingStorageType=accounting_storage/slurmdbd
AccountingStoragePort=$((PORT + 2))
AccountingStoragePass=$RUN/munge.sock
AccountingStorageTRES=gres/gpu
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
SchedulerParameters=bf_interval=2,sched_interval=2,batch_sched_delay=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
${CTLD_PARAMS:+SlurmctldParameters=$CTLD_PARAMS}
SlurmdParameters=config_overrides
ReturnToService=2
GresTypes=gpu
MailProg=/bin/true
SlurmdTimeout=10
KillWait=5
NodeName=node[1-$N] NodeHostname=$HOST NodeAddr=127.0.0.1 Port=$((PORT + 11))-$((PORT + 10 + N)) CPUs=$CPUS CoresPerSocket=$CPUS RealMemory=16000 Gres=gpu:$GPUS Feature=stand_in
PartitionName=main Nodes=ALL Default=YES DefaultTime=30 DefMemPerCPU=100 PriorityTier=10 PreemptMode=OFF
PartitionName=low Nodes=ALL DefaultTime=30 DefMemPerCPU=100 PriorityTier=1 PreemptMode=REQUEUE GraceTime=120
END
for i in $(seq 0 $((GPUS - 1))); do
  [ -c "$ROOT/dev/gpu$i" ] || mknod "$ROOT/dev/gpu$i" c 1 3
done
echo "Name=gpu File=$ROOT/dev/gpu[0-$((GPUS - 1))]" >"$ROOT/etc/gres.conf"

alive "$RUN/slurmdbd.pid" || MYSQL_UNIX_PORT="$RUN/mysql.sock" slurmdbd
wait_for sacctmgr -n show cluster
sacctmgr -n show cluster sim | grep -q . || sacctmgr -iQ add cluster sim >/dev/null
alive "$RUN/slurmctld.pid" || slurmctld
for i in $(seq "$N"); do
  mkdir -p "$ROOT/spool/node$i"
  alive "$RUN/slurmd.node$i.pid" || slurmd -N "node$i"
done
ready() { [ "$(sinfo -h -N -p main -t idle,alloc,mix,comp -o %N | sort -u | wc -l)" = "$N" ]; }
wait_for ready
echo "$N nodes up: export SLURM_CONF=$SLURM_CONF"
