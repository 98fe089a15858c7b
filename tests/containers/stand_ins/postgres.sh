# Makes a cluster with one role and its database, as the image `postgres` does, and serves it.
set -eu
bin=/usr/lib/postgresql/15/bin
data=/var/lib/postgresql/data
install -d -o postgres -m 700 "$data"
install -d -o postgres /var/run/postgresql
as_postgres() {
  setpriv --reuid postgres --regid postgres --init-groups "$@"
}
if [ ! -s "$data/PG_VERSION" ]; then
  as_postgres "$bin/initdb" --pgdata "$data" --username "$POSTGRES_USER" \
    --pwfile "$POSTGRES_PASSWORD_FILE" --auth-local trust --auth-host scram-sha-256 --no-sync
  echo 'host all all all scram-sha-256' >>"$data/pg_hba.conf"
  echo "CREATE DATABASE $POSTGRES_USER" | as_postgres "$bin/postgres" --single -D "$data" postgres
fi
exec setpriv --reuid postgres --regid postgres --init-groups \
  "$bin/postgres" -D "$data" -c 'listen_addresses=*' -c fsync=off
