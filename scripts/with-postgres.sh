#!/usr/bin/env bash
# Runs a command with a PostgreSQL server to talk to, so that nobody has to set one up first.
#
#   scripts/with-postgres.sh [--fast] [--tls] [--standby sync|async] [-c NAME=VALUE]… COMMAND [ARGUMENT…]
#
# The command finds the server in STORAGE_LOCK_POSTGRESQL_DSN. If that variable is set already, its server is used
# and nothing is started. Otherwise a throwaway cluster is started from the PostgreSQL binaries of this machine, on a
# free port of 127.0.0.1 and a private socket folder, and removed when the command ends, however it ends: a
# watcher process does that, so not even SIGKILL of this script leaves a server behind. For a cluster of its own
# the command also gets STORAGE_LOCK_POSTGRESQL_CTL, a program that runs pg_ctl on it ("$…_CTL" restart -m fast).
#
# --fast gives up durability (fsync = off): for tests that don't crash the server. Default: durable.
# --tls lets the server take TLS too, with a certificate that it signed by itself. Needs `openssl`.
# --standby starts a second server too, which follows the first one by streaming replication; with sync, what is
#   committed waits for it. The DSN names both, the first one first, and asks for the one that can be written to.
#   STORAGE_LOCK_POSTGRESQL_STANDBY_CTL runs pg_ctl on the standby ("$…_STANDBY_CTL" promote).
# -c sets a parameter of the throwaway servers, in postgresql.conf: for what has to be known when they start.
set -euo pipefail

readonly name=${0##*/}
usage() {
  echo "usage: $name [--fast] [--tls] [--standby sync|async] [-c NAME=VALUE]... COMMAND [ARGUMENT...]" >&2
  exit 2
}
fast=
tls=
standby=
settings=()
while :; do
  case ${1-} in
    --fast)
      fast=yes
      shift
      ;;
    --tls)
      tls=yes
      shift
      ;;
    --standby)
      [[ ${2-} =~ ^a?sync$ ]] || usage
      standby=$2
      shift 2
      ;;
    -c)
      [[ ${2-} =~ ^[A-Za-z_][A-Za-z0-9_.]*= ]] || usage
      settings+=("$2")
      shift 2
      ;;
    *) break ;;
  esac
done
[ $# -gt 0 ] || usage
if [ -n "${STORAGE_LOCK_POSTGRESQL_DSN-}" ]; then
  exec "$@"
fi

die() {
  echo "$name: $*" >&2
  exit 1
}

needed=(initdb pg_ctl postgres)
if [ -n "$standby" ]; then needed+=(pg_basebackup); fi

# Prints the first folder that has all programs that are needed: on the PATH, where pg_config says, or the highest
# version in the usual places.
find_binaries() {
  local folder folders program
  folders=$(
    {
      if command -v initdb >/dev/null; then dirname "$(command -v initdb)"; fi
      pg_config --bindir
      printf '%s\n' /usr/lib/postgresql/*/bin /usr/pgsql-*/bin | sort -rV
      printf '%s\n' /opt/homebrew/opt/postgresql*/bin /usr/local/opt/postgresql*/bin | sort -rV
      printf '%s\n' /usr/local/pgsql/bin
    } 2>/dev/null
  ) || true
  while read -r folder; do
    for program in "${needed[@]}"; do
      [ -x "$folder/$program" ] || continue 2
    done
    echo "$folder"
    return
  done <<<"$folders"
}

install_binaries() {
  local sudo=
  if [ "$(id -u)" -ne 0 ]; then
    sudo -n true 2>/dev/null || return 1
    sudo="sudo -n"
  fi
  command -v apt-get >/dev/null || return 1
  echo "$name: no PostgreSQL binaries found; installing Debian's postgresql package" >&2
  local install=(env DEBIAN_FRONTEND=noninteractive apt-get -qq -y -o DPkg::Lock::Timeout=120 install)
  local config=/etc/postgresql-common/createcluster.conf
  # Only the binaries are wanted, not the permanent cluster that the package would make and start.
  {
    $sudo apt-get -qq update &&
      $sudo "${install[@]}" postgresql-common &&
      $sudo sed -i 's/^#create_main_cluster = true/create_main_cluster = false/' "$config" &&
      $sudo "${install[@]}" postgresql
    $sudo sed -i 's/^create_main_cluster = false/#create_main_cluster = true/' "$config"
  } >&2
}

binaries=$(find_binaries)
if [ -z "$binaries" ]; then
  install_binaries || true
  binaries=$(find_binaries)
fi
[ -n "$binaries" ] || die "no PostgreSQL server binaries (${needed[*]}) found, and none could be installed.
Install them (Debian, Ubuntu: apt-get install postgresql; Red Hat, Fedora: dnf install postgresql-server;
macOS: brew install postgresql) or set STORAGE_LOCK_POSTGRESQL_DSN to a server that is running."

# initdb and postgres refuse root: root hands the cluster to another user.
server_user=
if [ "$(id -u)" -eq 0 ]; then
  for candidate in postgres nobody; do
    if id "$candidate" >/dev/null 2>&1; then
      server_user=$candidate
      break
    fi
  done
  [ -n "$server_user" ] || die "PostgreSQL doesn't run as root, and there is no user postgres or nobody to run it as."
fi

# A setting as a line of postgresql.conf, whatever characters its value has.
as_line() {
  local value=${1#*=}
  value=${value//\\/\\\\}
  value=${value//\'/\'\'}
  value=${value//$'\n'/\\n}
  printf "%s = '%s'\n" "${1%%=*}" "$value"
}

# Whatever ends the script from here on: nothing stays behind.
folder='' watcher=''
# shellcheck disable=SC2317 # called by the trap
clean_up() {
  if [ -n "$watcher" ]; then
    exec 9>&-
    wait "$watcher" || true
  elif [ -n "$folder" ]; then
    rm -rf "$folder"
  fi
}
trap clean_up EXIT
trap 'exit 130' INT
trap 'exit 143' TERM
trap 'exit 129' HUP

# /tmp and not TMPDIR: the path of a Unix socket may have 107 bytes at most.
folder=$(mktemp -d /tmp/storage-lock-postgres.XXXXXX)
# What the servers may write; the rest of the folder is ours, and run by us.
readonly own="$folder/server"

# Stops a cluster: its pg_ctl, and its data folder.
take_away() {
  # A server that somebody stopped (SIGSTOP) would not hear of its end.
  if [ -r "$own/$2/postmaster.pid" ]; then kill -s CONT "$(head -n 1 "$own/$2/postmaster.pid")" || true; fi
  "$folder/$1" stop -m immediate || true
}
# The watcher has a process group of its own, which a signal to ours doesn't reach. It ends when the last writer of its
# pipe has gone, which is this script, alive or killed: everything that the script starts gets descriptor 9 closed. A
# command that still runs has lost its server then, and is ended.
mkfifo "$folder/alive"
set -m
(
  trap '' INT TERM HUP
  read -r _ <"$folder/alive" || true
  if [ -r "$folder/command" ]; then kill -s TERM "$(cat "$folder/command")" || true; fi
  take_away ctl data
  take_away standby-ctl standby
  rm -rf "$folder"
) >/dev/null 2>&1 </dev/null &
watcher=$!
set +m
exec 9>"$folder/alive"

mkdir -m 700 "$own"
# Without what the caller has set for programs of PostgreSQL: it is meant for other servers.
cat >"$folder/as-server-user" <<END
#!/bin/sh
cd '$own' || exit
for name in \$(env | sed -n 's/^\(PG[A-Z_]*\)=.*/\1/p'); do
  [ "\$name" = PGPASSWORD ] || unset "\$name"
done
if [ -z '$server_user' ] || [ "\$(id -u)" -ne 0 ]; then exec "\$@"; fi
if command -v runuser >/dev/null; then exec runuser -u '$server_user' -- "\$@"; fi
exec su -s /bin/sh '$server_user' -c 'exec "\$0" "\$@"' -- "\$@"
END
# Makes a program that runs pg_ctl on a cluster: its name, and those of the cluster's data folder and log.
make_ctl() {
  cat >"$folder/$1" <<END
#!/bin/sh
exec '$folder/as-server-user' '$binaries/pg_ctl' -D '$own/$2' -w -t 60 -l '$own/$3' "\$@"
END
  chmod +x "$folder/$1"
}
chmod +x "$folder/as-server-user"
make_ctl ctl data log
make_ctl standby-ctl standby standby.log

readonly role=storage_lock
password=$(od -An -N16 -tx1 /dev/urandom | tr -d ' \n')
printf '%s\n' "$password" >"$own/password"
chmod 711 "$folder"
if [ -n "$server_user" ]; then
  chown -R "$server_user" "$own"
fi

"$folder/as-server-user" "$binaries/initdb" -D "$own/data" -U "$role" --pwfile="$own/password" \
  --auth=password --encoding=UTF8 --locale=C --no-sync >"$folder/initdb.log" 2>&1 9>&- ||
  die "initdb failed: $(cat "$folder/initdb.log")"
rm "$own/password"
if [ -n "$tls" ]; then
  (
    cd "$own/data"
    "$folder/as-server-user" openssl req -new -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=localhost \
      -keyout "$own/data/server.key" -out "$own/data/server.crt"
  ) >"$folder/openssl.log" 2>&1 || die "no certificate can be made: $(cat "$folder/openssl.log")"
  settings+=(ssl=on)
fi
{
  echo "listen_addresses = '127.0.0.1'"
  echo "unix_socket_directories = '$own'"
  echo "max_connections = 300"
  if [ -n "$fast" ]; then
    echo "fsync = off"
    echo "full_page_writes = off"
  fi
  # From the first transaction on. Replication connects as, and so is known by, this name.
  if [ "$standby" = sync ]; then echo "synchronous_standby_names = 'standby'"; fi
  # With no setting at all, older shells take the bare expansion for an unset variable.
  for setting in ${settings[@]+"${settings[@]}"}; do as_line "$setting"; done
} >>"$own/data/postgresql.conf"

# Starts a cluster on a free port, which is then in `port`: its pg_ctl, and the names of its data folder and log.
# A port is free if the server can bind it: that is the only test without a race. 32768 and up are handed out to
# clients.
start() {
  for _ in 1 2 3 4 5 6 7 8 9 10; do
    port=$((15000 + (RANDOM * 32768 + RANDOM) % 17000))
    if "$folder/$1" -o "-p $port" start >/dev/null 2>&1 9>&-; then
      # Restarts by ctl come back to the same port.
      echo "port = $port" >>"$own/$2/postgresql.conf"
      return
    fi
  done
  die "the server doesn't start: $(tail -n 20 "$own/$3")"
}
start ctl data log
hosts=127.0.0.1
ports=$port
attributes=
if [ -n "$standby" ]; then
  PGPASSWORD=$password "$folder/as-server-user" "$binaries/pg_basebackup" -D "$own/standby" --write-recovery-conf \
    -d "host=127.0.0.1 port=$port user=$role application_name=standby" --checkpoint=fast --no-sync \
    >"$folder/basebackup.log" 2>&1 9>&- || die "pg_basebackup failed: $(cat "$folder/basebackup.log")"
  {
    # Once it is promoted nobody follows it.
    echo "synchronous_standby_names = ''"
    # It is back soon after a restart of the primary.
    echo "wal_retrieve_retry_interval = 200ms"
  } >>"$own/standby/postgresql.conf"
  start standby-ctl standby standby.log
  hosts=$hosts,127.0.0.1
  ports=$ports,$port
  attributes=" target_session_attrs=read-write"
  export STORAGE_LOCK_POSTGRESQL_STANDBY_CTL="$folder/standby-ctl"
fi

export STORAGE_LOCK_POSTGRESQL_DSN="host=$hosts port=$ports user=$role password=$password dbname=postgres$attributes"
export STORAGE_LOCK_POSTGRESQL_CTL="$folder/ctl"

# In the background, so that a signal to this script reaches the command at once; with its own standard input, and
# with the interrupt that a shell takes from its background commands.
(
  trap - INT
  exec "$@"
) <&0 9>&- &
readonly command=$!
echo "$command" >"$folder/command"
for signal in INT TERM HUP; do
  # shellcheck disable=SC2064
  trap "kill -s $signal $command 2>/dev/null || true" "$signal"
done
code=0
wait "$command" || code=$?
# A signal ends the wait, not the command.
while kill -0 "$command" 2>/dev/null; do
  code=0
  wait "$command" || code=$?
done
rm "$folder/command"
exit "$code"
